"""The engine benchmark runs from its command line, and its arithmetic is right."""

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.engine import ideal_rate, main, matrix_product_gmacs_per_s
from tests.bundles import tiny_bundle


def test_the_command_measures_a_bundle_and_writes_its_results(tmp_path):
    app = Typer()
    app.command()(main)
    out = tmp_path / "engine.json"
    arguments = ["--bundle", str(tiny_bundle(tmp_path / "tiny")), "--fraction", "0.5", "--images", "200"]
    done = CliRunner(env={"EXITSERVE_DATA": ""}).invoke(app, [*arguments, "--rounds", "2", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "share of the ideal reached" in done.output
    assert "SYNTHETIC" in done.output
    (report,) = json.loads(out.read_text())
    assert [len(report[name]) for name in ("with_exits", "exits_off")] == [2, 2]
    for on, off in zip(report["with_exits"], report["exits_off"], strict=True):
        assert sum(on["shares"]) == pytest.approx(1)
        assert off["shares"] == [0, 0, 0, 1]
        assert on["mean_mflops"] < off["mean_mflops"]
        assert on["images_per_s"] > 0
    assert [len(report[name]) for name in ("ideals", "ideals_off")] == [2, 2]
    assert max(report["ideals"]) > min(report["ideals_off"]) > 0


def test_the_ideal_counts_each_stage_for_the_images_that_reach_it():
    # All images take 1 ms, half 2 ms more, a quarter 4 ms more: 3 ms per image on each of two lanes.
    assert ideal_rate([0.001, 0.002, 0.004], [0.5, 0.25, 0.25], n_lanes=2) == pytest.approx(2 / 0.003)


def test_the_matrix_product_rate_is_positive():
    assert matrix_product_gmacs_per_s(size=64, repeats=2) > 0
