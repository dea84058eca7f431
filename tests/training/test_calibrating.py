import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from models.boosting import Boosting
from models.predictor import features_of
from models.scores import plain_scores, score_exits
from tests.training import tiny
from training.calibration import CalibrationRecord, ExitOutputs, calibrate, load_trained, outputs_of
from training.checkpoint import RunError, RunFolder
from training.ensemble import fit_ensemble
from training.evaluation import Evaluation
from training.image_set import DataError, ImageSet, Split
from training.loop import Trainer
from training.processes import Processes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return tiny.image_set(tmp_path_factory.mktemp("data") / "cifar")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, images: ImageSet) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    Trainer(tiny.recipe(), images, RunFolder(path), 0, Processes(0, 1, CPU)).train()
    return path


@pytest.fixture
def folder(tmp_path: Path, trained: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(trained, tmp_path / "run")))


def test_stored_outputs_equal_the_networks(folder: RunFolder, images: ImageSet) -> None:
    record = calibrate(folder, images, CPU)
    split = Split.load(folder.split, tiny.N_TRAIN)
    assert (record.step, record.epochs) == (8, 2.0)
    assert (record.train_images, record.heldout_images, record.test_images) == (64, 40, 60)
    assert record.split_sha256 == split.sha256
    assert record.ensemble is not None
    network, _ = load_trained(folder, n_classes=4, ensemble=record.ensemble)
    parts = (
        (folder.heldout, images.train_images[split.held_out], images.train_labels[split.held_out]),
        (folder.test, images.test_images, images.test_labels),
    )
    for path, pixels, labels in parts:
        outputs = ExitOutputs.load(path)
        assert np.array_equal(outputs.labels, labels)
        # Reference: one image at a time, normalised here.
        for row in range(0, len(labels), 7):
            normal = (pixels[row] / 255.0 - np.array(images.mean)) / np.array(images.std)
            batch = torch.from_numpy(normal.transpose(2, 0, 1)[None].astype(np.float32))
            with torch.no_grad():
                logits = [x.numpy() for x in network(batch)]
            assert outputs.predictions[row].tolist() == [int(x.argmax()) for x in logits]
            for name, score in plain_scores(len(logits)).items():
                assert outputs.scores[name].dtype == np.float32
                assert outputs.scores[name][row] == pytest.approx(score_exits(score, logits)[0], abs=1e-3)
            assert outputs.features[row] == pytest.approx(features_of(logits)[0], abs=1e-3)
        assert np.array_equal(outputs.correct, outputs.predictions == labels[:, None])


def test_the_ensemble_is_fitted_to_the_held_out_images(folder: RunFolder, images: ImageSet) -> None:
    """To training images it would be overconfident; the test images measure it."""
    fitted = calibrate(folder, images, CPU).ensemble
    assert fitted is not None
    network, _ = load_trained(folder, n_classes=4)
    temperatures, network.boosting = network.boosting.temperatures, Boosting([0.0, 0.0])
    held_out = Split.load(folder.split, tiny.N_TRAIN).held_out
    normal = (images.train_images[held_out] / 255.0 - np.array(images.mean)) / np.array(images.std)
    with torch.no_grad():
        heads = network(torch.from_numpy(normal.transpose(0, 3, 1, 2).astype(np.float32)))
    expected = fit_ensemble(heads, torch.from_numpy(images.train_labels[held_out]), temperatures)
    assert fitted.temperatures == pytest.approx(expected.temperatures, abs=1e-3)
    assert fitted.head_scales == pytest.approx(expected.head_scales, abs=1e-3)


def test_calibrating_twice_gives_the_same(folder: RunFolder, images: ImageSet) -> None:
    calibrate(folder, images, CPU)
    first = ExitOutputs.load(folder.heldout)
    calibrate(folder, images, CPU)
    second = ExitOutputs.load(folder.heldout)
    assert list(first.scores) == list(plain_scores(2))
    assert all(np.array_equal(first.scores[name], second.scores[name]) for name in first.scores)
    assert np.array_equal(first.features, second.features)


def test_without_refit_the_ensemble_is_unchanged(folder: RunFolder, images: ImageSet) -> None:
    record = calibrate(folder, images, CPU, refit=False)
    assert record.ensemble is None
    network, _ = load_trained(folder, n_classes=4)
    normal = (images.test_images / 255.0 - np.array(images.mean)) / np.array(images.std)
    with torch.no_grad():
        logits = network(torch.from_numpy(normal.transpose(0, 3, 1, 2).astype(np.float32)))
    assert np.array_equal(ExitOutputs.load(folder.test).predictions, np.stack([x.argmax(1) for x in logits], axis=1))


def test_confidence_is_the_largest_softmax_output() -> None:
    logits = [3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))]
    outputs = outputs_of(logits, torch.zeros(20, dtype=torch.int64))
    assert outputs.confidence[:, 0] == pytest.approx(logits[0].softmax(1).amax(1).numpy(), abs=1e-6)


def test_top5_is_whether_the_label_is_among_the_five_largest() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(2, 50, 9)).astype(np.float32)
    labels = draw.integers(0, 9, 50)
    outputs = outputs_of(list(torch.from_numpy(logits)), torch.from_numpy(labels))
    for i, at_exit in enumerate(logits):
        expected = [label in np.argsort(-row)[:5] for row, label in zip(at_exit, labels, strict=True)]
        assert outputs.correct_top5[:, i].tolist() == expected


def test_another_runs_split_is_refused(folder: RunFolder, images: ImageSet) -> None:
    Split.make(tiny.N_TRAIN, tiny.N_HELDOUT, seed=99).save(folder.split)
    with pytest.raises(RunError, match="not the split that this run was trained with"):
        calibrate(folder, images, CPU)


def test_other_images_are_refused(folder: RunFolder, images: ImageSet, tmp_path: Path) -> None:
    described = json.loads(folder.description.read_text())
    described["data"]["name"] = "photos"
    folder.description.write_text(json.dumps(described))
    with pytest.raises(DataError, match="trained on 'photos', but --data holds 'cifar100'"):
        calibrate(folder, images, CPU)


def test_images_changed_since_training_are_refused(folder: RunFolder, images: ImageSet) -> None:
    """Their number is the same, so the split would fit, but other images would be held out."""
    with pytest.raises(DataError, match="added, removed or renamed since"):
        calibrate(folder, ImageSet(**{**vars(images), "listing": "other.png"}), CPU)


def test_another_number_of_classes_is_refused(folder: RunFolder, images: ImageSet) -> None:
    with pytest.raises(RunError, match="not the weights of this recipe and these images"):
        load_trained(folder, n_classes=5)


def test_after_further_training_calibration_must_be_repeated(folder: RunFolder, images: ImageSet) -> None:
    calibrate(folder, images, CPU)
    CalibrationRecord.load(folder)
    state = folder.load_checkpoint()
    state["progress"]["step"] += 1
    folder.save_checkpoint(state)
    with pytest.raises(RunError, match="calibrated at step 8, but trained further, to step 9, since"):
        CalibrationRecord.load(folder)


def test_a_new_calibration_invalidates_the_evaluation(folder: RunFolder, images: ImageSet) -> None:
    """At the same step, `refit` or `half_weights` may change the answers, so the old results do not apply."""
    record = calibrate(folder, images, CPU)
    folder.results.write_text("of the calibration before")
    calibrate(folder, images, CPU, refit=False)
    with pytest.raises(RunError, match="not evaluated yet"):
        Evaluation.load(folder, record)


def test_an_interrupted_calibration_leaves_the_run_uncalibrated(
    folder: RunFolder, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(folder, images, CPU)
    save = ExitOutputs.save

    def cut_short(self: ExitOutputs, path: Path) -> None:
        save(self, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(ExitOutputs, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        calibrate(folder, images, CPU, refit=False)
    with pytest.raises(RunError, match="not calibrated yet"):
        CalibrationRecord.load(folder)


def test_missing_or_damaged_runs_are_reported(folder: RunFolder, images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run there \(run\.json is missing\)"):
        calibrate(RunFolder(tmp_path / "nowhere"), images, CPU)
    whole = folder.description.read_text()
    for damaged in (whole[:100], "[]", "{}", json.dumps({**json.loads(whole), "recipe": {"epochs": "many"}})):
        folder.description.write_text(damaged)
        with pytest.raises(RunError, match=r"run\.json: damaged.*train into another folder"):
            calibrate(folder, images, CPU)
    folder.description.write_text(whole)
    folder.checkpoint.unlink()
    with pytest.raises(RunError, match=r"no checkpoint\.pt yet"):
        calibrate(folder, images, CPU)


def test_missing_and_damaged_results_are_reported(folder: RunFolder, images: ImageSet) -> None:
    with pytest.raises(RunError, match="not calibrated yet"):
        CalibrationRecord.load(folder)
    with pytest.raises(RunError, match=r"heldout\.npz is missing"):
        ExitOutputs.load(folder.heldout)
    calibrate(folder, images, CPU)
    folder.heldout.write_bytes(folder.heldout.read_bytes()[:500])
    with pytest.raises(RunError, match="calibrate again"):
        ExitOutputs.load(folder.heldout)
    folder.calibration.write_text("{}")
    with pytest.raises(RunError, match="calibrate again"):
        CalibrationRecord.load(folder)
