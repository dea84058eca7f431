"""The training benchmark runs from its command line, and its arithmetic is right."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from benchmarks import training
from benchmarks.training import FORWARD_AND_BACKWARD, WARM_UP_BATCHES, Report, main, measure, plain_rate, show
from tests.training import tiny
from training.image_set import DataError
from training.recipe import Recipe


def test_both_loops_are_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    app = Typer()
    app.command()(main)
    recipe, out = tiny.write_recipe(tmp_path / "tiny.toml"), tmp_path / "training.json"
    arguments = ["--recipe", str(recipe), "--images", "224", "--rounds", "1", "--processes", "1", "--workers", "0"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert [len(report[name]) for name in ("ours", "plain")] == [1, 1]
    (ours,), (plain,) = report["ours"], report["plain"]
    assert f"{ours / plain:.2f} x" in done.output
    assert f"{FORWARD_AND_BACKWARD * report['mmacs_forward'] * ours / 1e3:.1f}" in done.output
    assert report["precision"] == "fp32"
    assert report["peak_gmacs_per_s"]["fp32"] > 0
    assert "epoch 2 of 2" in capfd.readouterr().out  # the project's command has trained


def test_too_few_images_to_time_are_refused(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "tiny.toml")
    with pytest.raises(DataError, match=r"191 images are too few .*: give 192 or more"):
        measure(str(recipe), [], torch.device("cpu"), 1, 0, n_images=191, rounds=1)


def test_the_plain_loops_first_batches_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches follow the first ones, within the 4 s between the two readings of the clock."""
    recipe = Recipe.load(str(tiny.write_recipe(tmp_path / "tiny.toml")), [])
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    n_images = (WARM_UP_BATCHES + 2) * recipe.optimisation.batch_rows + 1
    images, labels = np.zeros((n_images, 32, 32, 3), np.uint8), np.zeros(n_images, np.int64)
    rate = plain_rate(recipe, images, labels, torch.device("cpu"), workers=0)
    assert rate == 2 * recipe.optimisation.batch_rows / 4


def test_speeds_are_medians_and_shares_are_of_the_precisions_own_peak() -> None:
    report = Report(
        recipe="tiny",
        device="CPU",
        image_size_px=32,
        batch_rows=16,
        processes=2,
        workers=2,
        mmacs_forward=10.0,
        ours=[100.0, 300.0, 200.0],
        plain=[50.0, 100.0, 90.0],
        peak_gmacs_per_s={"fp32": 9.0, "bf16": 24.0},
        precision="bf16",
    )
    assert report.speed_up == pytest.approx(200 / 90)
    show(report, Console(file=(told := io.StringIO()), width=140))
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in told.getvalue().splitlines() if "│" in line]
    assert rows[:5] == [
        ["images/s, median of rounds", "200 (100 to 300)", "90 (50 to 100)"],
        ["speed-up", "2.22 x", "1"],
        ["G multiply-adds/s", "6.0", "2.7"],
        ["measured peak of matrix products at its precision", "24", "9"],
        ["share of that peak", "25%", "30%"],
    ]
