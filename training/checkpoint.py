"""A run's folder: its description, checkpoints that resume exactly, and the paths of all its files."""

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.errors import TrainingError
from training.recipe import Recipe
from training.sources import commit

DESCRIBED = frozenset({"recipe", "seed", "data", "processes"})  # fields of run.json that later steps read
CHECKPOINTED = frozenset({"network", "optimiser", "progress"})  # in every checkpoint


class RunError(TrainingError):
    """A run folder that can't be used; the message names the file and the fix."""


@dataclass
class Progress:
    """How far a run has got; saved in its checkpoint."""

    step: int = 0
    seconds: float = 0.0  # spent training, resumed runs included
    # The objective's statistics, summed over the steps of the current epoch, [statistics][exits].
    epoch_sums: list[list[float]] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)  # of the last step, where a schedule moves them

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """Restore from a checkpoint, ignoring fields that only older versions have."""
        return cls(**{key: value for key, value in state.items() if key in cls.__dataclass_fields__})


@dataclass(frozen=True)
class RunFolder:
    """The files of a run. Each command reads the files that the commands before it wrote."""

    path: Path

    # train
    @property
    def description(self) -> Path:
        return self.path / "run.json"

    @property
    def split(self) -> Path:
        return self.path / "split.npz"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    # calibrate
    @property
    def calibration(self) -> Path:
        return self.path / "calibration.json"

    @property
    def heldout(self) -> Path:
        return self.path / "heldout.npz"

    @property
    def test(self) -> Path:
        return self.path / "test.npz"

    # gate
    @property
    def head_inputs(self) -> Path:
        return self.path / "head_inputs.pt"

    # evaluate
    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def frontier_plot(self) -> Path:
        return self.path / "frontier.png"

    def read_description(self) -> dict[str, Any]:
        """Read run.json: everything that made the run.

        Raises:
            RunError: there is no run, or the file is damaged.
        """
        if not self.description.is_file():
            raise RunError(f"{self.path}: no run there (run.json is missing); `python -m training train` creates one")
        try:
            description: dict[str, Any] = json.loads(self.description.read_text())
        except ValueError as error:
            raise RunError(f"{self.description}: damaged ({error}); train into another folder") from error
        if not isinstance(description, dict) or DESCRIBED - description.keys():
            raise RunError(f"{self.description}: damaged, or from another version; train into another folder")
        return description

    def read_recipe(self) -> Recipe:
        """The recipe in run.json; raises as `read_description`."""
        try:
            return Recipe.model_validate(self.read_description()["recipe"])
        except ValueError as error:
            reason = "damaged, or from another version"
            raise RunError(f"{self.description}: {reason}; train into another folder") from error

    def forget_calibration(self) -> None:
        """Remove the records of calibration and evaluation before either is repeated.

        If that is interrupted, the run counts as not calibrated, and never mixes files of two networks.
        """
        for path in (self.results, self.calibration):
            path.unlink(missing_ok=True)

    def append_log(self, record: dict[str, Any]) -> None:
        with self.log.open("a") as log:
            log.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """One record per epoch, in order; a last line cut short because the run was killed is ignored.

        Raises:
            RunError: another line is damaged.
        """
        if not self.log.is_file():
            return []
        *lines, _ = self.log.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
                if "epoch" not in records[-1]:
                    raise ValueError("no epoch")
            except (ValueError, TypeError) as error:
                raise RunError(f"{self.log}: line {number} is damaged; remove that line, or the whole file") from error
        return records

    def trim_log(self, n_epochs: int) -> None:
        """Drop epochs after `n_epochs`: a run killed after logging but before its checkpoint repeats them."""
        if self.log.is_file():
            kept = [record for record in self.read_log() if record["epoch"] <= n_epochs]
            partial = self.log.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
            partial.replace(self.log)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write to a second file, then replace the checkpoint: being killed while writing loses nothing."""
        partial = self.checkpoint.with_suffix(".partial")
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # torch's error when the disk is full
            partial.unlink(missing_ok=True)
            reason = str(error).partition("\n")[0]
            kept = ", which resumes from the previous checkpoint" if self.checkpoint.is_file() else ""
            raise RunError(
                f"{partial}: can't be written in full ({reason}): if the disk is full, make room and give the same "
                f"command again{kept}"
            ) from error
        partial.replace(self.checkpoint)

    def load_checkpoint(self) -> dict[str, Any]:
        """Read the last checkpoint: `network` (what is evaluated), `optimiser` and `progress`; see also `Averaging`.

        Raises:
            RunError: there is none yet, or it is damaged.
        """
        if not self.checkpoint.is_file():
            raise RunError(
                f"{self.path}: no checkpoint.pt yet; `python -m training train` writes one after every epoch"
            )
        try:
            state: Any = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"{self.checkpoint}: can't be read ({reason}); remove it and train again") from error
        if not isinstance(state, dict) or CHECKPOINTED - state.keys():
            raise RunError(
                f"{self.checkpoint}: not a checkpoint of `python -m training`; restore that of this run, or remove it "
                "and train again"
            )
        return state

    def restore_weights(self, network: nn.Module, state: dict[str, Any]) -> None:
        """Load the weights of a checkpoint into a network.

        Raises:
            RunError: they belong to another network, for instance one with more classes.
        """
        try:
            network.load_state_dict(state["network"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise RunError(
                f"{self.checkpoint}: not the weights of this recipe and these images ({reason}); restore the original "
                "run.json and checkpoint.pt, or train into another folder"
            ) from error


def describe_run(recipe: Recipe, seed: int, data: dict[str, Any], n_processes: int, command: str) -> dict[str, Any]:
    """Everything that made a run: recipe, seed, images, code, machine and command."""
    return {
        "recipe": recipe.model_dump(),
        "seed": seed,
        "data": data,
        "processes": n_processes,
        "commit": commit(),
        "command": command,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
    }
