"""The benchmark of the latency target runs from its command line, and its results match what happened."""

import json
from math import isnan, nan

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.degrade import arrivals, main, slices
from service.budget.state import BudgetState
from tests.bundles import tiny_bundle


@pytest.fixture
def app():
    app = Typer()
    app.command()(main)
    return app


def test_the_command_runs_its_phases_and_writes_its_results(app, tmp_path):
    out, figure = tmp_path / "degrade.json", tmp_path / "degrade.svg"
    arguments = ["--bundle", str(tiny_bundle(tmp_path / "tiny")), "--images", "400", "--phases", "1x0.02,1x0.05"]
    arguments += [
        "--slice-s",
        "0.5",
        "--target-ms",
        "30000",
        "--lanes",
        "1",
        "--json",
        str(out),
        "--figure",
        str(figure),
    ]
    done = CliRunner(env={"EXITSERVE_DATA": ""}).invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "SYNTHETIC" in done.output
    report = json.loads(out.read_text())
    assert [row["from_s"] for row in report["slices"]] == [0, 0.5, 1, 1.5]
    for row in report["slices"]:
        assert row["answered_per_s"] == row["offered_per_s"]
        assert not row["limited"]
        assert row["working_mflops"] == pytest.approx(report["budget_mflops"])
    offered = sum(row["offered_per_s"] for row in report["slices"]) * 0.5
    assert offered == pytest.approx(0.07 * report["capacity_per_s"], rel=0.6)
    assert "</svg>" in figure.read_text()


def test_a_slice_counts_the_images_that_were_due_in_it():
    state = BudgetState(60, 1, 60, 32, 1, (), 55, 0.7, (1,), False, None, 0, 0, 0, 0, 0, 0)
    first, second = slices([(0.1, 0.010), (0.2, 0.030), (0.4, nan), (1.9, 0.5)], [state, state], slice_s=1.0)
    assert (first.offered_per_s, first.answered_per_s, first.refused) == (3, 2, 1)
    assert first.p50_ms == pytest.approx(20)
    assert first.p95_ms == pytest.approx(29)
    assert (second.offered_per_s, second.refused) == (1, 0)
    [empty] = slices([], [state], slice_s=1.0)
    assert isnan(empty.p95_ms)


def test_arrivals_are_poisson_in_each_phase():
    due = arrivals([(10, 0.5), (10, 2.0)], capacity_per_s=100, seed=1)
    assert due == sorted(due)
    assert sum(moment < 10 for moment in due) == pytest.approx(500, abs=80)
    assert sum(moment >= 10 for moment in due) == pytest.approx(2_000, abs=160)


@pytest.mark.parametrize("phases", ["", "5", "5x", "5x0", "0x1", "-1x1", "nanx1", "5x1;3x2"])
def test_malformed_phases_are_refused_with_an_example(app, phases):
    done = CliRunner().invoke(app, ["--phases", phases])
    assert done.exit_code == 2
    assert "5x0.4" in done.output
