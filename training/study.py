"""A study: one recipe trained in several variants, and what each change gains at every exit."""

import csv
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.calibration import CalibrationRecord, ExitOutputs, calibrate
from training.checkpoint import RunError, RunFolder
from training.data import load_image_set
from training.errors import TrainingError
from training.launching import BAD_INPUT, launch
from training.named import find_toml
from training.objectives import boosting_of, network_of
from training.options import DEFAULT_SIZE_PX, MAX_SEED
from training.recipe import Recipe, changes

STUDY_FOLDER = Path(__file__).parent / "studies"


class StudyError(TrainingError):
    """A study that can't be run; the message says why and what to do."""


class Variant(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    set: list[str] = []  # changes to the study's recipe, as `train --set` takes them


class Study(BaseModel):
    """Variants of one recipe, trained with the same seeds and so with the same splits, initial weights and batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    recipe: str
    set: list[str] = []  # changes for all variants
    baseline: str  # the variant that the others are compared with
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(default=[0], min_length=1)
    variants: dict[str, Variant]

    @classmethod
    def load(cls, name_or_path: str) -> "Study":
        """Read a bundled study by name, or any study by path.

        Raises:
            StudyError: there is no such study, it is not valid, or its variants differ in the number of exits.
            RecipeError: there is no such recipe, or a variant's changes to it are not valid.
        """
        path = find_toml(name_or_path, STUDY_FOLDER, "study", StudyError)
        try:
            study = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise StudyError(f"{path}: {error}") from error
        if study.baseline not in study.variants:
            variants = ", ".join(study.variants)
            raise StudyError(f"{path}: baseline {study.baseline!r} is not a variant; choose from {variants}")
        exits = {name: _count_exits(study.recipe_of(name)) for name in study.variants}
        if len(set(exits.values())) > 1:
            counts = ", ".join(f"{name} {n}" for name, n in exits.items())
            raise StudyError(
                f"{path}: variants are compared exit by exit, but differ in the number of exits ({counts}); "
                "change the variants, or make a study for each number"
            )
        return study

    def recipe_of(self, variant: str) -> Recipe:
        return Recipe.load(self.recipe, [*self.set, *self.variants[variant].set])

    def runs(self, folder: Path, seeds: Sequence[int] | None = None) -> Iterator[tuple[str, int, RunFolder]]:
        """Yield all variants with the first seed, then with the next: so comparisons are complete early."""
        for seed in seeds or self.seeds:
            for name in self.variants:
                yield name, seed, RunFolder(folder / f"{name}-seed{seed}")


def _count_exits(recipe: Recipe) -> int:
    with torch.device("meta"):
        return len(boosting_of(network_of(recipe, n_classes=2)).temperatures)


def run_study(
    study: Study,
    folder: Path,
    data: Path,
    device: torch.device,
    n_processes: int,
    seeds: Sequence[int] | None = None,
    image_size_px: int = DEFAULT_SIZE_PX,
) -> None:
    """Train and calibrate all runs that are not finished yet; a study that was stopped is resumed.

    Args:
        seeds: which of the study's seeds to train; by default all. So several machines can divide a study.
        image_size_px: side at which an image folder is read.

    Raises:
        StudyError: a run ended early, stopped by a signal or failed; or the study has no such seed.
    """
    if unknown := set(seeds or ()).difference(study.seeds):
        raise StudyError(f"the study has no seeds {sorted(unknown)}; choose from {study.seeds}")
    images = None
    for name, seed, run in study.runs(folder, seeds):
        recipe = study.recipe_of(name)
        if not is_trained(run, recipe):
            settings = [f"--set={setting}" for setting in (*study.set, *study.variants[name].set)]
            options = ["--recipe", study.recipe, "--data", str(data), "--seed", str(seed), "--device", device.type]
            options += ["--image-size", str(image_size_px)]
            status = launch(n_processes, ["train", str(run.path), *options, *settings])
            if status == BAD_INPUT:
                raise StudyError(f"{run.path}: not trained, for the reason given above")
            if status or not is_trained(run, recipe):
                raise StudyError(f"{run.path}: ended early; give the same command again to resume the study")
        record = calibration_of(run)
        if record is None or record.ensemble is not None:  # a study compares networks as trained
            images = images or load_image_set(data, image_size_px)
            calibrate(run, images, device, refit=False)


def is_trained(run: RunFolder, recipe: Recipe) -> bool:
    """Whether a run has trained to its last epoch.

    Raises:
        StudyError: it has another recipe.
    """
    if not run.checkpoint.is_file():
        return False
    if changes(run.read_recipe(), recipe):
        raise StudyError(
            f"{run.path}: trained with another recipe than the study's; remove it, or choose another folder"
        )
    log = run.read_log()
    return bool(log) and log[-1]["epoch"] == recipe.optimisation.epochs


def calibration_of(run: RunFolder) -> CalibrationRecord | None:
    """The calibration of a run; None if there is none."""
    try:
        return CalibrationRecord.load(run)
    except RunError:
        return None


@dataclass(frozen=True)
class VariantResult:
    """Results of a variant, over the seeds whose runs are finished."""

    name: str
    label: str
    is_baseline: bool
    seeds: list[int]
    held_out_accuracy: NDArray[np.float64]  # [seeds, exits]
    test_accuracy: NDArray[np.float64]  # [seeds, exits]
    valid_shares: NDArray[np.float64]  # [seeds, epochs, exits], of each epoch's samples, see `training.objectives.Loss`
    gain: NDArray[np.float64]  # [seeds, exits]: test accuracy minus the baseline's with the same seed
    gain_error: NDArray[np.float64]  # [exits]: standard error of the mean gain, over test images (paired)
    minutes: float  # of training, mean over the seeds


def results_of(study: Study, folder: Path) -> list[VariantResult]:
    """Read the results of a study's finished runs; variants without one are left out.

    Raises:
        StudyError: the baseline has no finished run, or a run was calibrated with a fitted ensemble.
    """
    finished: dict[str, dict[int, RunFolder]] = {name: {} for name in study.variants}
    for name, seed, run in study.runs(folder):
        if is_trained(run, study.recipe_of(name)) and (record := calibration_of(run)) is not None:
            if record.ensemble is not None:
                raise StudyError(
                    f"{run.path}: calibrated with a fitted ensemble, but a study compares networks as trained; give "
                    "the command without --report to calibrate it again"
                )
            finished[name][seed] = run
    baseline = {seed: ExitOutputs.load(run.test).correct for seed, run in finished[study.baseline].items()}
    if not baseline:
        raise StudyError(f"{folder}: the baseline {study.baseline!r} has no finished run yet; run the study first")
    return [
        _result(study, name, {s: r for s, r in runs.items() if s in baseline}, baseline)
        for name, runs in finished.items()
        if any(seed in baseline for seed in runs)
    ]


def _result(
    study: Study, name: str, runs: dict[int, RunFolder], baseline: dict[int, NDArray[np.bool_]]
) -> VariantResult:
    tests = {seed: ExitOutputs.load(run.test).correct for seed, run in runs.items()}
    logs = [run.read_log() for run in runs.values()]
    difference = np.stack([tests[seed].astype(float) - baseline[seed] for seed in runs])  # [seeds, images, exits]
    return VariantResult(
        name=name,
        label=study.variants[name].label,
        is_baseline=name == study.baseline,
        seeds=list(runs),
        held_out_accuracy=np.stack([ExitOutputs.load(run.heldout).correct.mean(0) for run in runs.values()]),
        test_accuracy=np.stack([tests[seed].mean(0) for seed in runs]),
        valid_shares=np.array([[record["valid_shares"] for record in log] for log in logs]),
        gain=difference.mean(1),
        gain_error=difference.mean(0).std(0) / np.sqrt(difference.shape[1]),
        minutes=float(np.mean([log[-1]["seconds"] for log in logs])) / 60,
    )


def write_table(results: Sequence[VariantResult], path: Path) -> None:
    """Write the results as CSV, a row per variant, seed and exit; valid shares are the last epoch's."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["variant", "seed", "exit", "held_out_accuracy", "test_accuracy", "gain", "valid_share"])
        for result in results:
            for i, seed in enumerate(result.seeds):
                for exit_index in range(result.gain.shape[1]):
                    columns = (result.held_out_accuracy, result.test_accuracy, result.gain, result.valid_shares[:, -1])
                    values: list[Any] = [round(float(column[i, exit_index]), 4) for column in columns]
                    rows.writerow([result.name, seed, exit_index + 1, *values])
