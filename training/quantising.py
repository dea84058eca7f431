"""Adds int8 stages to a bundle and measures their accuracy, scores and frontier. It needs no run, only the bundle.

Activation ranges come from training images, so that the held-out images, which set the thresholds, stay unseen until
then. The test images decide nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from models.bundle import Bundle, BundleError, load_bundle
from models.bundle_writing import copy_files, write_bundle
from models.calibration import CALIBRATION, CALIBRATION_INT8
from models.exits import outcome
from models.frontier import build_frontier
from models.gates import GateScore
from models.manifest import Manifest, StageInfo
from models.onnx_weights import StageLoadError
from models.predictor import Predictor
from models.scores import score_exits
from training.calibration import ExitOutputs, outputs_of
from training.errors import TrainingError
from training.evaluation import calibration_of, plain_predictor
from training.image_set import DataError, ImageSet, Split
from training.jei.record import SCORE
from training.policies import fit_scores
from training.quantisation import FOLDER, quantise_stages
from training.stage_sessions import StageSessions

FRACTIONS = (0.3, 0.4, 0.6, 0.8)
MOST_DIFFERENT = 0.005  # share of held-out answers that rounding may turn from right to wrong or back
HEADING = "## In int8\n"


@dataclass(frozen=True)
class BudgetPoint:
    """Result of the test images with early exit, at the thresholds for one budget."""

    fraction: float  # the budget, of the full network's cost
    executed_mflops: float
    accuracy: float


@dataclass(frozen=True)
class PrecisionResult:
    """Results of the stages of one precision; accuracies are shares."""

    heldout_accuracy: tuple[float, ...]  # by exit
    test_accuracy: tuple[float, ...]
    budgets: tuple[BudgetPoint, ...]


@dataclass(frozen=True)
class Quantised:
    """The bundle that was made, and the results of both precisions."""

    bundle: Bundle
    fp32: PrecisionResult
    int8: PrecisionResult


def quantise(path: Path, images: ImageSet, n_images: int, output: Path) -> Quantised:
    """Write a bundle with int8 stages beside its float ones; a bundle at `output` is replaced.

    Args:
        path: the bundle; if it has int8 stages, they are made anew.
        images: those that it was trained on.
        n_images: number of training images, drawn at random, that determine the activation ranges.

    Raises:
        TrainingError: the bundle was not trained on these images, or can't be loaded or written.
    """
    try:
        bundle = load_bundle(path)
        split = _split_of(bundle, images)
        drawn = np.random.default_rng(0).permutation(split.train)[:n_images]
        gates = score if isinstance(score := bundle.score(), GateScore) else None
        heldout, test = _measure(bundle.path, bundle.manifest.stages, images, split, "fp32", gates)
        _refuse_strange(bundle, heldout, test)
        with TemporaryDirectory() as made:
            contents = Path(made)
            kept = (file for file in bundle.manifest.files if not file.startswith(f"{FOLDER}/"))
            copy_files(bundle.path, contents, (file for file in kept if file != CALIBRATION_INT8))
            stages = quantise_stages(bundle, images.train_images[np.sort(drawn)], contents)
            opened = [StageInfo.model_validate(stage) for stage in stages]
            int8_heldout, int8_test = _measure(contents, opened, images, split, "int8", gates)
            calibration_of(int8_heldout).save(contents / CALIBRATION_INT8)
            fp32, _ = _result(bundle.manifest, heldout, test)
            int8, refitted = _result(bundle.manifest, int8_heldout, int8_test)
            # Gates are not refitted: that would need the loss of every image, and a trade-off.
            manifest = bundle.manifest.model_dump(exclude={"format_version", "version", "files"})
            predictor = plain_predictor(refitted) if gates is None else manifest["predictor"]
            manifest["int8"] = {
                "stages": stages,
                "exits": [
                    {"test_accuracy": test_accuracy, "heldout_accuracy": heldout_accuracy}
                    for test_accuracy, heldout_accuracy in zip(int8.test_accuracy, int8.heldout_accuracy, strict=True)
                ],
                "predictor": predictor,
                "range_images": len(drawn),
                "made_with": f"onnxruntime {ort.__version__}, QDQ, weights of 7 bits a channel, activations of 8",
            }
            _write_section(contents / "README.md", fp32, int8, bundle.manifest.data.test_images, len(drawn))
            written = write_bundle(output, manifest, bundle.calibration, contents, replace=True)
            return Quantised(written, fp32, int8)
    except (BundleError, StageLoadError) as error:
        raise TrainingError(str(error)) from error


def _split_of(bundle: Bundle, images: ImageSet) -> Split:
    """Draw the split that a bundle was trained with again.

    Raises:
        DataError: these are not the images that it was trained on.
    """
    manifest = bundle.manifest
    data, seed = manifest.data, manifest.training.get("seed")
    side = (manifest.input.height_px, manifest.input.width_px)
    if images.train_images.shape[1:3] != side:
        raise DataError(f"--data holds images of {images.train_images.shape[1:3]} pixels; {bundle.path} takes {side}")
    if images.class_names != manifest.class_names:
        raise DataError(
            f"--data holds the classes {_some(images.class_names)}, and {bundle.path} was trained on "
            f"{_some(manifest.class_names)} ({data.name}): give the images that it was trained on"
        )
    if not isinstance(seed, int) or data.split_sha256 is None:
        raise DataError(f"{bundle.path}: its manifest has no seed and split; train and export it with this version")
    if data.train_images == 0:  # as `examples.own_network --epochs 0` packs a network
        raise DataError(
            f"{bundle.path}: its network was packed as it is, with no image to train on; int8 stages need training "
            "images for the ranges of the activations"
        )
    if len(images.train_labels) == data.train_images + data.heldout_images:
        split = Split.make(len(images.train_labels), data.heldout_images, seed)
        if split.sha256 == data.split_sha256:
            return split
    raise DataError(
        f"--data holds {len(images.train_labels)} training images, and {bundle.path} was trained on "
        f"{data.train_images} of {data.name} with {data.heldout_images} held out, so the split differs; "
        "give the images that the bundle was trained on"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _refuse_strange(bundle: Bundle, heldout: ExitOutputs, test: ExitOutputs) -> None:
    """Raise a DataError if the float stages don't answer as the bundle says.

    Compared are held-out answers with the bundle's calibration, and test images in number and accuracy.
    """
    differ = float((heldout.correct != bundle.calibration.correct).mean())
    if differ > MOST_DIFFERENT:
        raise DataError(
            f"--data: {differ:.1%} of the held-out answers disagree with {bundle.path / CALIBRATION} about being "
            "correct: these are not the images that the bundle was trained on, or their order differs; give those"
        )
    n_images, accuracies = bundle.manifest.data.test_images, [e.test_accuracy for e in bundle.manifest.exits]
    told = [(new, old) for new, old in zip(_shares(test.correct), accuracies, strict=True) if old is not None]
    most = MOST_DIFFERENT + 1 / len(test.labels)  # of few images, one may differ
    if len(test.labels) != n_images or any(abs(new - old) > most for new, old in told):
        raise DataError(
            f"--data: its {len(test.labels):,} test images are not the {n_images:,} on which {bundle.path} was "
            "measured, so int8 could not be compared: give those"
        )


def _measure(
    folder: Path, stages: Sequence[StageInfo], images: ImageSet, split: Split, precision: str, gates: GateScore | None
) -> tuple[ExitOutputs, ExitOutputs]:
    """Outputs of these stages for held-out and for test images."""
    sessions = StageSessions(folder, stages)

    def outputs(part: str, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> ExitOutputs:
        logits = sessions.run(pixels, f"{precision}, {part}")
        made = outputs_of([torch.from_numpy(x) for x in logits], torch.from_numpy(labels))
        return made if gates is None else made.scored(SCORE, score_exits(gates, logits))

    return (
        outputs("held out", images.train_images[split.held_out], images.train_labels[split.held_out]),
        outputs("test", images.test_images, images.test_labels),
    )


def _result(manifest: Manifest, heldout: ExitOutputs, test: ExitOutputs) -> tuple[PrecisionResult, Predictor | None]:
    """Results of one precision with the manifest's score and family; predictor and thresholds are fitted anew."""
    costs = [exit_.executed_mflops for exit_ in manifest.exits]
    score = fit_scores(heldout)[manifest.score]
    frontier = build_frontier(score.heldout, heldout.correct, costs, manifest.family)
    scores: NDArray[Any] = score.of(manifest.score, test)
    budgets = []
    for fraction in FRACTIONS:
        thresholds = frontier.at_cost(fraction * costs[-1]).thresholds
        done = outcome(scores, test.correct, costs, np.array(thresholds))
        budgets.append(BudgetPoint(fraction, done.mean_cost, done.accuracy))
    return PrecisionResult(_shares(heldout.correct), _shares(test.correct), tuple(budgets)), score.predictor


def _shares(correct: NDArray[np.bool_]) -> tuple[float, ...]:
    return tuple(correct.mean(axis=0).tolist())


def _write_section(card: Path, fp32: PrecisionResult, int8: PrecisionResult, n_test: int, n_images: int) -> None:
    """Append the section on int8 to a model card, replacing an older one."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    text = re.sub(rf"\n*{re.escape(HEADING)}.*", "", text, flags=re.DOTALL)
    card.write_text(f"{text.rstrip()}\n\n{int8_section(fp32, int8, n_test, n_images)}", encoding="utf-8")


def int8_section(fp32: PrecisionResult, int8: PrecisionResult, n_test: int, n_images: int) -> str:
    """The section on int8 stages for a model card, in markdown."""
    exits = "\n".join(
        f"| {number} | {100 * a:.2f} | {100 * b:.2f} | {100 * (b - a):+.2f} |"
        for number, (a, b) in enumerate(zip(fp32.test_accuracy, int8.test_accuracy, strict=True), start=1)
    )
    budgets = "\n".join(
        f"| {a.fraction:.0%} | {a.executed_mflops:.2f} | {100 * a.accuracy:.2f} "
        f"| {b.executed_mflops:.2f} | {100 * b.accuracy:.2f} | {100 * (b.accuracy - a.accuracy):+.2f} |"
        for a, b in zip(fp32.budgets, int8.budgets, strict=True)
    )
    error = 100 * 0.5 / sqrt(n_test)
    return f"""{HEADING}
The same network with 8-bit weights and activations, for CPUs: `--precision int8`. Activation ranges come from
{n_images:,} training images. It has its own scores and thresholds, from the same held-out images. Measured on the
{n_test:,} test images, not used for any choice. The standard error of an accuracy is at most {error:.1f} points.

| exit | fp32 top-1 % | int8 top-1 % | points |
| ---: | ---: | ---: | ---: |
{exits}

With early exit, at budgets given as fractions of the full cost:

| budget | fp32 spent M | fp32 top-1 % | int8 spent M | int8 top-1 % | points |
| ---: | ---: | ---: | ---: | ---: | ---: |
{budgets}
"""
