"""The training benchmark runs from its command line, and its arithmetic is right."""

import json
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks.training import FORWARD_AND_BACKWARD, main, measure
from tests.training import tiny
from training.image_set import DataError


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
