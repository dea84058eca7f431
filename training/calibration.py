"""Calibration: the outputs of every exit for held-out and test images, from which thresholds and results are made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from tqdm import tqdm

from models.boosting import Boosting
from models.predictor import features_of
from models.scores import plain_scores, score_exits
from training.augment import DeviceImages
from training.checkpoint import Progress, RunError, RunFolder
from training.ensemble import Ensemble, fit_ensemble
from training.image_set import DataError, ImageSet, Split
from training.jei.record import SCORE, GateRecord
from training.objectives import boosting_of, network_of, served, trainable
from training.recipe import Augmentation

BATCH_ROWS = 250
STORED = ("labels", "predictions", "correct", "correct_top5", "features")


@dataclass(frozen=True)
class ExitOutputs:
    """Answers and scores of M images at N exits."""

    labels: NDArray[np.int64]  # [M]
    predictions: NDArray[np.int64]  # [M, N]
    correct: NDArray[np.bool_]  # [M, N]: the prediction is the label
    correct_top5: NDArray[np.bool_]  # [M, N]: the label is among the five largest logits
    # By name: [M, N], higher = more confident; all of `models.scores.plain_scores`, and `jei_gates` if a run has gates.
    scores: dict[str, NDArray[np.float32]]
    features: NDArray[np.float32]  # [M, N, FEATURES], the input of fitted scores, see `models.predictor`

    @property
    def confidence(self) -> NDArray[np.float64]:
        """The largest softmax output [M, N], 0 to 1."""
        confidence: NDArray[np.float64] = 1 / (1 + np.exp(-self.scores["max_softmax"].astype(np.float64)))
        return confidence

    def scored(self, name: str, scores: NDArray[np.floating[Any]]) -> "ExitOutputs":
        """Return a copy with one more score."""
        return replace(self, scores={**self.scores, name: scores.astype(np.float32)})

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {f"scores_{name}": values for name, values in self.scores.items()}
        arrays |= {name: getattr(self, name) for name in STORED}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> "ExitOutputs":
        """Read what `save` wrote.

        Raises:
            RunError: it is missing or damaged.
        """
        if not path.is_file():
            raise RunError(f"{path.parent}: {path.name} is missing; run `python -m training calibrate` first")
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                stored = {name: arrays[name] for name in STORED}
                names = [*plain_scores(stored["correct"].shape[1])]
                names += [SCORE] if f"scores_{SCORE}" in arrays else []
                return cls(**stored, scores={name: arrays[f"scores_{name}"] for name in names})
        except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
            raise RunError(f"{path}: damaged, or from another version ({error}); calibrate again") from error


class CalibrationRecord(BaseModel):
    """What was calibrated, and on which images, so that later steps need no image set and notice further training."""

    model_config = ConfigDict(extra="forbid")

    step: int  # of the checkpoint
    epochs: float  # trained so far
    seconds: float  # of training
    scores: list[str]
    data_name: str
    split_sha256: str
    train_images: int  # trained on
    heldout_images: int
    test_images: int
    class_names: list[str]
    image_size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    half_weights: bool = False  # see `load_trained`
    temperatures: tuple[float, ...] = ()  # at the end of training; older records have none
    ensemble: Ensemble | None = None  # fitted to the held-out images; None: as trained

    @classmethod
    def load(cls, folder: RunFolder) -> "CalibrationRecord":
        """Read the record of a run.

        Raises:
            RunError: there is none, or it is of an older checkpoint than the run's.
        """
        folder.read_description()
        if not folder.calibration.is_file():
            raise RunError(f"{folder.path}: not calibrated yet; run `python -m training calibrate` first")
        try:
            record = cls.model_validate_json(folder.calibration.read_text())
        except ValueError as error:
            raise RunError(f"{folder.calibration}: damaged, or from another version; calibrate again") from error
        step = folder.load_checkpoint()["progress"]["step"]
        if step != record.step:
            raise RunError(
                f"{folder.path}: calibrated at step {record.step}, but trained further, to step {step}, since; "
                "run `python -m training calibrate` again"
            )
        return record


def calibrate(
    folder: RunFolder,
    images: ImageSet,
    device: torch.device,
    half_weights: bool = False,
    refit: bool = True,
) -> CalibrationRecord:
    """Run a trained network over its stored held-out images and over the test images, and save the exits' outputs.

    Results of an earlier evaluation are removed; calibration.json is written last and marks the run as calibrated.
    Both sets are read with the test transform. The published code reads the held-out images through random crops and
    flips instead, which makes them look harder than the test images are.

    Args:
        half_weights: see `load_trained`.
        refit: fit the ensemble to the held-out images first, see `training.ensemble`; False leaves it as trained. The
            same images set the thresholds later; two numbers per exit, fitted to thousands of images, hardly overfit.
            A run with gates (`training.jei`) keeps the ensemble with which the gates were fitted.

    Raises:
        RunError, DataError: the run has no checkpoint, or `images` is not the set it was trained on.
    """
    made_by = folder.read_description()
    split = checked_split(folder, made_by["data"], images)
    network, progress = load_trained(folder, len(images.class_names), half_weights)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = boosting_of(network)
    network.boosting = Boosting([0.0] * len(trained.temperatures))  # makes the network return each head's own logits
    heads, labels = exit_logits(network, _part(images, split.held_out, device), folder.heldout.stem)
    gates = GateRecord.load(folder)
    if gates is not None:
        ensemble = gates.ensemble
    else:
        ensemble = fit_ensemble(heads, labels, trained.temperatures) if refit else None
    network.boosting = ensemble.build() if ensemble is not None else trained
    logits = network.boosting.eval()(heads)
    test_logits, test_labels = exit_logits(network, _part(images, None, device), folder.test.stem)
    heldout, test = outputs_of(logits, labels), outputs_of(test_logits, test_labels)
    if gates is not None:
        heldout = heldout.scored(SCORE, gates.heldout_scores([x.numpy() for x in logits]))
        test = test.scored(SCORE, score_exits(gates.score(), [x.numpy() for x in test_logits]))
    folder.forget_calibration()
    heldout.save(folder.heldout)
    test.save(folder.test)
    steps_per_epoch = folder.read_recipe().optimisation.steps_per_epoch(len(split.train))
    record = CalibrationRecord(
        step=progress.step,
        epochs=progress.step / steps_per_epoch,
        seconds=progress.seconds,
        scores=list(heldout.scores),
        data_name=images.name,
        split_sha256=split.sha256,
        train_images=len(split.train),
        heldout_images=len(split.held_out),
        test_images=len(images.test_labels),
        class_names=images.class_names,
        image_size_px=images.image_size_px,
        mean=images.mean,
        std=images.std,
        half_weights=half_weights,
        temperatures=trained.temperatures,
        ensemble=ensemble,
    )
    folder.calibration.write_text(record.model_dump_json(indent=2) + "\n")
    return record


def _part(images: ImageSet, held_out: NDArray[np.int64] | None, device: torch.device) -> DeviceImages:
    """The held-out images or, if `held_out` is None, the test images."""
    if held_out is None:
        return DeviceImages(images.test_images, images.test_labels, images.mean, images.std, device)
    pixels, labels = images.train_images[held_out], images.train_labels[held_out]
    return DeviceImages(pixels, labels, images.mean, images.std, device)


def load_trained(
    folder: RunFolder, n_classes: int, half_weights: bool = False, ensemble: Ensemble | None = None
) -> tuple[nn.Module, Progress]:
    """Rebuild the network of a run with its trained weights, in evaluation mode, on the CPU.

    Args:
        half_weights: round the weights to half precision, so that a bundle can store them in half the space.
        ensemble: sums the heads in place of the ensemble that the network was trained with.
    """
    state = folder.load_checkpoint()
    recipe, progress = folder.read_recipe(), Progress.of(state["progress"])
    network = trainable(network_of(recipe, n_classes), recipe.objective)
    folder.restore_weights(network, state)
    if progress.temperatures:
        network.boosting.temperatures = progress.temperatures  # type: ignore[union-attr]
    served(network)
    if half_weights:
        round_to_half(network)
    if ensemble is not None:
        network.boosting = ensemble.build()
    return network.eval(), progress


@torch.no_grad()
def round_to_half(network: nn.Module) -> None:
    """Round the weights of convolutions and linear layers in place, but not normalisation, whose range is wide."""
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.copy_(weight.half())


def run_exits(network: nn.Module, images: DeviceImages, description: str) -> ExitOutputs:
    """Answers and scores of a network with N exits for M images, computed in float32, batch by batch."""
    return outputs_of(*exit_logits(network, images, description))


@torch.no_grad()
def exit_logits(network: nn.Module, images: DeviceImages, description: str) -> tuple[list[Tensor], Tensor]:
    """Logits [M, classes] of every exit for images [M], in float32, and the images' labels, all on the CPU."""
    collected: list[list[Tensor]] = []
    for rows in in_batches(images, description):
        pixels, _ = images.plain(rows)
        collected.append([logits.float().cpu() for logits in network(pixels)])
    return [torch.cat(parts) for parts in zip(*collected, strict=True)], images.labels.cpu()


def in_batches(images: DeviceImages, description: str) -> Iterator[Tensor]:
    """The indices of all images, in order and in batches, with a progress bar."""
    batches = torch.arange(len(images), device=images.labels.device).split(BATCH_ROWS)
    yield from tqdm(batches, unit="image", unit_scale=BATCH_ROWS, desc=description, disable=None)


def outputs_of(exit_logits: Sequence[Tensor], exit_labels: Tensor) -> ExitOutputs:
    """Answers and scores from the logits [M, classes] of every exit."""
    logits, labels = [x.numpy() for x in exit_logits], exit_labels.numpy()
    predictions = np.stack([x.argmax(axis=1) for x in logits], axis=1)
    # Counting the classes above the label needs no sort; ties count in the label's favour.
    n_above = np.stack([(x > x[np.arange(len(labels)), labels][:, None]).sum(axis=1) for x in logits], axis=1)
    scores = {name: score_exits(score, logits).astype(np.float32) for name, score in plain_scores(len(logits)).items()}
    features = features_of(logits).astype(np.float32)
    return ExitOutputs(labels, predictions, predictions == labels[:, None], n_above < 5, scores, features)


def checked_split(folder: RunFolder, made_with: dict[str, object], images: ImageSet) -> Split:
    """Load the stored split and check that it belongs to these images: another would calibrate on training images.

    Raises:
        RunError, DataError: it is damaged or another run's; or the images are not those the run was trained on.
    """
    split = Split.load(folder.split, len(images.train_labels))
    if images.name != made_with["name"]:
        raise DataError(
            f"{folder.path}: trained on {made_with['name']!r}, but --data holds {images.name!r}; give the original set"
        )
    if made_with.get("images_sha256", images.sha256) != images.sha256:
        raise DataError(
            f"{folder.path}: training images were added, removed or renamed since this run was trained, so its "
            "held-out images can no longer be identified; give the original images, or train again"
        )
    if made_with.get("split_sha256", split.sha256) != split.sha256:
        raise RunError(f"{folder.split}: not the split that this run was trained with; restore it, or train again")
    return split


def parts_of(
    images: ImageSet, split: Split, augmentation: Augmentation, device: torch.device
) -> tuple[DeviceImages, DeviceImages, DeviceImages]:
    """Training, held-out and test images; the training images have the augmentation of training, except CutMix."""
    a = augmentation
    pixels, labels = images.train_images[split.train], images.train_labels[split.train]
    moved = a.crop_padding_px, a.crop_area, a.cutout_px
    train = DeviceImages(pixels, labels, images.mean, images.std, device, *moved)
    return train, _part(images, split.held_out, device), _part(images, None, device)
