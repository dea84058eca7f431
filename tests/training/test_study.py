"""Studies: variants of a recipe, trained on a small image set."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.training import tiny
from training.__main__ import app
from training.calibration import CalibrationRecord, ExitOutputs, calibrate
from training.checkpoint import RunFolder
from training.loop import Trainer
from training.processes import Processes
from training.study import (
    STUDY_FOLDER,
    Study,
    StudyError,
    VariantResult,
    is_trained,
    results_of,
    run_study,
    write_table,
)
from training.study_report import plot_study, plot_valid_shares, print_study

CPU = torch.device("cpu")
STUDY = """
description = "tiny"
recipe = "{recipe}"
set = ["optimisation.epochs=1"]
baseline = "boosted"
seeds = [0, 1]
[variants.joint]
label = "joint"
set = ["objective.name='joint'"]
[variants.boosted]
label = "boosted"
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    recipe = tiny.write_recipe(tmp_path / "tiny.toml")
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(recipe=recipe))
    return Study.load(str(path))


def test_missing_runs_are_trained_and_variants_compared_by_seed(tmp_path: Path, study: Study) -> None:
    data, folder = tiny.write_folder(tmp_path / "cifar"), tmp_path / "runs"
    images = tiny.load_image_set(data)
    missing = "joint", 1
    for name, seed, run in study.runs(folder):
        if (name, seed) != missing:
            Trainer(study.recipe_of(name), images, run, seed, Processes(0, 1, CPU)).train()
            calibrate(run, images, CPU)
    before = {run.path: run.checkpoint.stat().st_mtime_ns for *_, run in study.runs(folder) if run.checkpoint.is_file()}
    assert len(before) == 3
    with pytest.raises(StudyError, match="calibrated with a fitted ensemble, but a study compares networks as trained"):
        results_of(study, folder)

    run_study(study, folder, data, CPU, n_processes=1)

    assert all(CalibrationRecord.load(run).ensemble is None for *_, run in study.runs(folder))
    assert all(RunFolder(path).checkpoint.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    results = {result.name: result for result in results_of(study, folder)}
    assert list(results) == ["joint", "boosted"]
    for i, seed in enumerate((0, 1)):
        ours, baseline = (
            ExitOutputs.load(RunFolder(folder / f"{name}-seed{seed}").test).correct.mean(0)
            for name in ("joint", "boosted")
        )
        assert np.allclose(results["joint"].gain[i], ours - baseline)
        assert np.allclose(results["joint"].test_accuracy[i], ours)
        held_out = ExitOutputs.load(RunFolder(folder / f"joint-seed{seed}").heldout).correct.mean(0)
        assert np.allclose(results["joint"].held_out_accuracy[i], held_out)
    assert np.all(results["boosted"].gain == 0)
    assert np.all(results["boosted"].gain_error == 0)
    difference = np.mean(
        [
            ExitOutputs.load(RunFolder(folder / f"joint-seed{seed}").test).correct.astype(float)
            - ExitOutputs.load(RunFolder(folder / f"boosted-seed{seed}").test).correct
            for seed in (0, 1)
        ],
        axis=0,
    )
    assert np.allclose(results["joint"].gain_error, difference.std(0) / np.sqrt(len(difference)))

    write_table(list(results.values()), tmp_path / "study.csv")
    with (tmp_path / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    assert float(rows[0]["test_accuracy"]) == pytest.approx(results["joint"].test_accuracy[0, 0], abs=1e-4)
    assert results["joint"].valid_shares.shape == (2, 1, 2)
    for seed, shares in zip((0, 1), results["joint"].valid_shares, strict=True):
        assert shares.tolist() == [r["valid_shares"] for r in RunFolder(folder / f"joint-seed{seed}").read_log()]
    for draw, name in ((plot_study, "study.png"), (plot_valid_shares, "valid.png")):
        draw(tmp_path / name, study.description, list(results.values()))
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=200, file=io.StringIO())
    print_study(list(results.values()), console)
    shown = console.export_text()
    for i in range(2):  # each seed has its row, the baseline none among the gains
        assert f"{100 * results['joint'].gain[i].mean():+.2f}" in shown
    assert shown.count("boosted") == 4

    told = CliRunner().invoke(
        app, ["study", str(tmp_path / "study.toml"), "--data", "x", "--runs", str(folder), "--report"]
    )
    assert told.exit_code == 0, told.output
    assert {"study.csv", "study.png", "valid.png"} <= {path.name for path in folder.iterdir()}


def test_a_seed_that_the_study_does_not_have_is_refused(tmp_path: Path, study: Study) -> None:
    with pytest.raises(StudyError, match=r"the study has no seeds \[7\]; choose from \[0, 1\]"):
        run_study(study, tmp_path / "runs", tmp_path, CPU, n_processes=1, seeds=[1, 7])


def test_a_run_of_another_recipe_is_not_used(tmp_path: Path, study: Study) -> None:
    images = tiny.image_set(tmp_path / "cifar")
    _, _, run = next(study.runs(tmp_path / "runs"))
    Trainer(study.recipe_of("boosted"), images, run, 0, Processes(0, 1, CPU)).train(time_limit_s=0)
    with pytest.raises(StudyError, match="joint-seed0: trained with another recipe than the study's"):
        run_study(study, tmp_path / "runs", tmp_path / "cifar", CPU, n_processes=1)


def test_a_recipe_whose_description_alone_has_changed_is_the_same(tmp_path: Path, study: Study) -> None:
    images = tiny.image_set(tmp_path / "cifar")
    _, _, run = next(study.runs(tmp_path / "runs"))
    recipe = study.recipe_of("joint")
    Trainer(recipe, images, run, 0, Processes(0, 1, CPU)).train()
    assert is_trained(run, recipe.model_copy(update={"description": "reworded"}))


def test_valid_shares_of_a_network_with_one_exit_are_drawn(tmp_path: Path) -> None:
    accuracy = np.full((1, 1), 0.5)
    result = VariantResult(
        "only", "only", True, [0], accuracy, accuracy, np.full((1, 2, 1), 0.9), accuracy - 0.5, np.zeros(1), 1.0
    )
    plot_valid_shares(tmp_path / "valid.png", "one exit", [result])
    assert (tmp_path / "valid.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fails_ends_the_study(tmp_path: Path, study: Study, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StudyError, match="joint-seed0: not trained, for the reason given above"):
        run_study(study, tmp_path / "runs", tiny.write_images(tmp_path / "own"), CPU, 1, image_size_px=64)
    assert "takes no images of 64 x 64 px, but 32" in capfd.readouterr().err


@pytest.mark.parametrize("status", [0, 130])
def test_a_run_that_is_stopped_ends_the_study(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("training.study.launch", lambda *_: status)
    with pytest.raises(StudyError, match="joint-seed0: ended early; give the same command again"):
        run_study(study, tmp_path / "runs", tmp_path, CPU, 1)


def test_a_baseline_that_is_missing_is_named(tmp_path: Path, study: Study) -> None:
    with pytest.raises(StudyError, match=r"'boosted' has no finished run"):
        results_of(study, tmp_path / "runs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('baseline = "boosted"', 'baseline = "bosted"'),
            "baseline 'bosted' is not a variant; choose from joint, boosted",
        ),
        (("objective.name='joint'", "objective.name='joined'"), r"objective\.name"),
        (("seeds = [0, 1]", "seeds = []"), "seeds"),
        (
            ("objective.name='joint'", "network.arguments.n_blocks=3"),
            r"differ in the number of exits \(joint 3, boosted 2\)",
        ),
    ],
)
def test_an_invalid_study_is_reported_before_training(
    tmp_path: Path, study: Study, change: tuple[str, str], message: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(STUDY.format(recipe=study.recipe).replace(*change))
    with pytest.raises(Exception, match=message):
        Study.load(str(path))


@pytest.mark.parametrize("path", sorted(STUDY_FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_that_ship_can_be_loaded(path: Path) -> None:
    assert Study.load(path.stem).baseline
