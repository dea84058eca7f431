"""Benchmarks report wrong bundles, images and options in a sentence."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from benchmarks.running import images_for
from models.bundle import load_bundle
from service.budget.target import TargetError
from tests.bundles import CLASS_NAMES
from tests.service.process import REPOSITORY
from tests.training import tiny
from training.image_set import DataError


@pytest.mark.parametrize("name", ["engine", "plan_check", "degrade", "http_cost", "precision", "league"])
def test_a_wrong_bundle_gives_an_error_without_a_traceback(name: str) -> None:
    asked = [sys.executable, "-m", f"benchmarks.{name}", "--bundle", "nowhere"]
    done = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: nowhere: there is no such folder; give the folder of a bundle")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("engine", ["--images", "3"]),  # a quarter, here 0, are for settling: waited forever
        ("engine", ["--policy", "any"]),
        ("engine", ["--rounds", "0"]),
        ("engine", ["--json", "nowhere/there.json"]),
        ("degrade", ["--slice-s", "0"]),  # looped forever
        ("degrade", ["--figure", "tests"]),
        ("plan_check", ["--seconds", "0"]),
        ("precision", ["--runs", "0"]),
        ("steering", ["--fractions", "0.4;0.6"]),
        ("http_workers", ["--workers", "0"]),
        ("http_workers", ["--workers", "one"]),
    ],
)
def test_options_that_cannot_be_measured_are_refused(name: str, arguments: list[str]) -> None:
    app = typer.Typer()
    app.command()(importlib.import_module(f"benchmarks.{name}").main)
    done = CliRunner(env={"EXITSERVE_DATA": ""}).invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert "Invalid value" in done.output


@pytest.mark.parametrize("name", ["engine", "degrade", "plan_check"])
def test_a_budget_out_of_reach_is_refused_with_the_range(name: str, bundle_path: Path) -> None:
    app = typer.Typer()
    app.command()(importlib.import_module(f"benchmarks.{name}").main)
    arguments = ["--bundle", str(bundle_path), "--images", "4", "--fraction", "1.5"]
    done = CliRunner(env={"EXITSERVE_DATA": ""}).invoke(app, arguments)
    assert isinstance(done.exception, TargetError)
    assert "give a value from" in str(done.exception)


def write_pictures(folder: Path, class_names: list[str]) -> Path:
    for i, name in enumerate(class_names):
        for part in ("train", "val"):
            (folder / part / name).mkdir(parents=True)
            Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(folder / part / name / "picture.png")
    return folder


def test_images_are_read_at_the_bundles_size_and_others_are_refused(bundle_path: Path, tmp_path: Path) -> None:
    bundle = load_bundle(bundle_path)
    found = images_for(bundle, write_pictures(tmp_path / "its own", CLASS_NAMES))
    assert found.test_images.shape == (len(CLASS_NAMES), 32, 32, 3)
    with pytest.raises(DataError, match="other: its classes are not those of"):
        images_for(bundle, write_pictures(tmp_path / "other", ["cat", "dog"]))
    with pytest.raises(DataError, match=r"images of 32 x 32 px, but .* takes 224 x 224"):
        images_for(load_bundle(REPOSITORY / "models/zoo/imagenette-msdnet"), tiny.write_folder(tmp_path / "cifar"))
