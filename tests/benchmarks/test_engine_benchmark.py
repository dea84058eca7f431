"""The engine benchmark runs from its command line, and its arithmetic is right."""

import io
import json
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from benchmarks import engine
from benchmarks.closed_loop import Round
from benchmarks.engine import Report, ideal_rate, main, matrix_product_gmacs_per_s, show
from models.bundle import load_bundle
from tests.bundles import tiny_bundle


def test_the_command_measures_a_bundle_and_writes_its_results(tmp_path, monkeypatch):
    """Stage times are the test's: those after a round are three times those before it."""
    seconds, asked = iter([0.001, 0.003] * 4), []

    def row_seconds(runner, bundle, mflops):
        asked.append(mflops)
        return [next(seconds)] * 4

    monkeypatch.setattr(engine, "full_row_seconds", row_seconds)
    app = Typer()
    app.command()(main)
    out, costs_mflops = tmp_path / "engine.json", load_bundle(tiny_bundle(tmp_path / "tiny")).costs_mflops
    arguments = ["--bundle", str(tmp_path / "tiny"), "--fraction", "0.5", "--images", "200", "--lanes", "2"]
    done = CliRunner(env={"EXITSERVE_DATA": ""}).invoke(app, [*arguments, "--rounds", "2", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "share of the ideal reached" in done.output
    assert "SYNTHETIC" in done.output
    (report,) = json.loads(out.read_text())
    assert [len(report[name]) for name in ("with_exits", "exits_off")] == [2, 2]
    for on, off in zip(report["with_exits"], report["exits_off"], strict=True):
        assert sum(on["shares"]) == pytest.approx(1)
        assert off["shares"] == [0, 0, 0, 1]
        assert on["mean_mflops"] == pytest.approx(np.dot(on["shares"], costs_mflops))
        assert off["mean_mflops"] == pytest.approx(costs_mflops[-1])
        assert on["mean_mflops"] < off["mean_mflops"]
        assert on["images_per_s"] > 0
    assert (
        asked
        == [pytest.approx(0.5 * costs_mflops[-1])] * 2
        + [None] * 2
        + [pytest.approx(0.5 * costs_mflops[-1])] * 2
        + [None] * 2
    )
    assert report["stage_row_seconds"] == pytest.approx([0.002] * 4)
    assert report["ideals_off"] == pytest.approx([2 / 0.008] * 2)
    assert report["ideals"] == pytest.approx([ideal_rate([0.002] * 4, on["shares"], 2) for on in report["with_exits"]])
    cost = median(on["mean_mflops"] for on in report["with_exits"])
    assert report["floor_images_per_s"] == pytest.approx(report["matrix_product_gmacs_per_s"] * 1e9 / (cost * 1e6))


def test_the_ideal_counts_each_stage_for_the_images_that_reach_it():
    # All images take 1 ms, half 2 ms more, a quarter 4 ms more: 3 ms per image on each of two lanes.
    assert ideal_rate([0.001, 0.002, 0.004], [0.5, 0.25, 0.25], n_lanes=2) == pytest.approx(2 / 0.003)


def test_the_speed_up_compares_within_rounds_and_shares_have_their_rounds_ideal():
    """In the second of three rounds, the machine was half as fast."""

    def rounds(*rates):
        return [Round(rate, [0.75, 0.25], 20.0, 8.0, 5.0, 0.5) for rate in rates]

    report = Report(
        bundle="tiny 1",
        images="images",
        n_images=10,
        n_lanes=2,
        policy="default",
        budget_fraction=0.4,
        with_exits=rounds(300, 120, 200),
        exits_off=rounds(100, 50, 100),
        stage_row_seconds=[0.001, 0.002],
        ideals=[400, 150, 250],
        ideals_off=[125, 100, 125],
        matrix_product_gmacs_per_s=50.0,
        floor_images_per_s=2500.0,
    )
    assert (report.rate, report.rate_off) == (200, 100)
    assert report.speed_up == 2.4  # of 3, 2.4 and 2: the medians' ratio would be 2
    assert report.share_of_ideal == pytest.approx([0.75, 0.8, 0.8])
    assert report.share_of_ideal_off == pytest.approx([0.8, 0.5, 0.8])
    show(report, Console(file=(told := io.StringIO()), width=160))
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:-1]]
        for line in told.getvalue().splitlines()
        if len(cells := line.replace("┃", "│").split("│")) == 5
    }
    assert rows["images/s, median of rounds"] == ["200 (120 to 300)", "100 (50 to 100)"]
    assert rows["speed-up"] == ["2.40 x", "1"]
    assert rows["ideal by stage times, images/s"] == ["250", "125"]
    assert rows["share of the ideal reached"] == ["80% (75% to 80%)", "80% (50% to 80%)"]
    assert "stage times per row, ms: 1.00, 2.00; matrix product 50 G MAC/s" in told.getvalue()


def test_the_matrix_product_rate_counts_multiply_adds(monkeypatch):
    """On a clock by which products take 2, 1 and 4 s: the best counts."""
    clock = iter([0.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert matrix_product_gmacs_per_s(size=10, repeats=3) == pytest.approx(1e3 / 1e9)
