"""A run made again from its bundle is calibrated and evaluated to the same numbers as the run that made it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bundles import read_manifest, tiny_bundle, write_manifest
from tests.training import tiny
from training.calibration import CalibrationRecord, ExitOutputs, calibrate
from training.checkpoint import RunError, RunFolder
from training.evaluation import cost_of, evaluate
from training.image_set import DataError, ImageSet
from training.loop import Trainer
from training.packing import pack
from training.plots import plot_run
from training.processes import Processes
from training.unpacking import unpack

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return tiny.image_set(tmp_path_factory.mktemp("data") / "cifar")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: ImageSet) -> tuple[RunFolder, Path]:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "first")
    Trainer(tiny.recipe(), images, folder, 0, ALONE, "python -m training train RUN").train()
    record = calibrate(folder, images, CPU)
    evaluation = evaluate(ExitOutputs.load(folder.heldout), ExitOutputs.load(folder.test), cost_of(folder, record))
    evaluation.save(folder, record)
    plot_run(folder, evaluation, record)
    pack(folder, folder.path.parent / "bundle", "first")
    return folder, folder.path.parent / "bundle"


def test_what_is_unpacked_calibrates_to_the_same_numbers(
    made: tuple[RunFolder, Path], images: ImageSet, tmp_path: Path
) -> None:
    first, bundle = made
    again = RunFolder(tmp_path / "again")
    unpack(bundle, again, images)
    record, before = calibrate(again, images, CPU), CalibrationRecord.load(first)
    same = {"ensemble": None, "seconds": 0.0}  # a manifest tells whole seconds
    assert record.model_copy(update=same) == before.model_copy(update=same)
    for one, other in ((first.heldout, again.heldout), (first.test, again.test)):
        made_first, made_again = ExitOutputs.load(one), ExitOutputs.load(other)
        assert np.array_equal(made_first.predictions, made_again.predictions)
        for name, scores in made_first.scores.items():  # the fit ends within its own tolerance
            np.testing.assert_allclose(made_again.scores[name], scores, atol=1e-3)


def test_the_bundle_answers_with_the_fitted_ensemble(made: tuple[RunFolder, Path]) -> None:
    first, bundle = made
    ensemble = CalibrationRecord.load(first).ensemble
    assert ensemble is not None
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["temperatures"] == manifest["arguments"]["temperatures"] == list(ensemble.temperatures)
    assert manifest["arguments"]["head_scales"] == list(ensemble.head_scales)


def test_a_run_is_never_written_over(made: tuple[RunFolder, Path], images: ImageSet) -> None:
    with pytest.raises(RunError, match="holds a run already"):
        unpack(made[1], made[0], images)


def test_other_images_are_refused(made: tuple[RunFolder, Path], images: ImageSet, tmp_path: Path) -> None:
    fewer = ImageSet(
        **{**vars(images), "train_images": images.train_images[1:], "train_labels": images.train_labels[1:]}
    )
    with pytest.raises(DataError, match="another split"):
        unpack(made[1], RunFolder(tmp_path / "again"), fewer)
    with pytest.raises(DataError, match="trained on 'cifar100'"):
        unpack(made[1], RunFolder(tmp_path / "again"), ImageSet(**{**vars(images), "name": "others"}))
    with pytest.raises(DataError, match="came, went or were renamed"):
        unpack(made[1], RunFolder(tmp_path / "again"), ImageSet(**{**vars(images), "listing": "other.png"}))
    larger = {name: getattr(images, name).repeat(2, 1).repeat(2, 2) for name in ("train_images", "test_images")}
    with pytest.raises(DataError, match="of 32 px, but --data was read at 64 px"):
        unpack(made[1], RunFolder(tmp_path / "again"), ImageSet(**{**vars(images), **larger}))
    assert not (tmp_path / "again").exists()


def test_a_bundle_that_was_not_trained_here_is_refused(tmp_path: Path, images: ImageSet) -> None:
    with pytest.raises(RunError, match=r"manifest\.json"):
        unpack(tmp_path, RunFolder(tmp_path / "again"), images)
    with pytest.raises(RunError, match="does not tell how `python -m training` made it"):
        unpack(tiny_bundle(tmp_path / "random"), RunFolder(tmp_path / "again"), images)


@pytest.mark.parametrize(("field", "value"), [("processes", None), ("seed", None), ("epochs", "two")])
def test_a_manifest_that_tells_half_of_how_it_was_made_is_refused(
    made: tuple[RunFolder, Path], images: ImageSet, tmp_path: Path, field: str, value: str | None
) -> None:
    bundle = Path(shutil.copytree(made[1], tmp_path / "bundle"))
    manifest = read_manifest(bundle)
    manifest["training"][field] = value
    if field == "processes":
        del manifest["training"][field]
    write_manifest(bundle, manifest)
    with pytest.raises(RunError, match="does not tell how"):
        unpack(bundle, RunFolder(tmp_path / "again"), images)
    assert not (tmp_path / "again").exists()


def test_a_run_made_again_is_at_its_end_whatever_it_minimised(
    made: tuple[RunFolder, Path], images: ImageSet, tmp_path: Path
) -> None:
    """The predictor of `weighted` is in no bundle: it would begin anew."""
    bundle, again = Path(shutil.copytree(made[1], tmp_path / "bundle")), RunFolder(tmp_path / "again")
    manifest = read_manifest(bundle)
    manifest["training"]["recipe"]["objective"]["name"] = "weighted"
    write_manifest(bundle, manifest)
    unpack(bundle, again, images)
    trainer = Trainer(again.read_recipe(), images, again, 0, ALONE)
    assert trainer.progress.step == trainer.total_steps
    assert trainer.train() == "finished"
