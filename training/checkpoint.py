"""Checkpoints that resume exactly, and the folder of a run."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.recipe import Recipe


class RunError(Exception):
    """A run folder that can't be used; the message names the file and the fix."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what made it and what it made: run.json, split.npz, checkpoint.pt, log.jsonl and results."""

    path: Path

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

    @property
    def outputs(self) -> Path:
        return self.path / "outputs.npz"

    def read_description(self) -> dict[str, Any]:
        if not self.description.is_file():
            raise RunError(f"{self.path}: no run there (run.json is missing); `python -m training train` makes one")
        return json.loads(self.description.read_text())

    def append_log(self, record: dict[str, Any]) -> None:
        with self.log.open("a") as log:
            log.write(json.dumps(record) + "\n")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write beside the old checkpoint, then replace it: a run that is killed while writing loses nothing."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def load_checkpoint(self) -> dict[str, Any]:
        if not self.checkpoint.is_file():
            raise RunError(f"{self.path}: no checkpoint.pt yet; `python -m training train` writes one after every epoch")
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            raise RunError(f"{self.checkpoint}: can't be read ({error}); remove it and train again") from error


def describe_run(recipe: Recipe, seed: int, data_name: str, data_path: Path, n_processes: int) -> dict[str, Any]:
    """Everything that made a run: recipe, seed, code, machine and command."""
    return {
        "recipe": recipe.model_dump(),
        "seed": seed,
        "data": {"name": data_name, "path": data_path.name},
        "processes": n_processes,
        "commit": _commit(),
        "command": "python -m training " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        run = ["git", "-C", str(here)]
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}{' (with uncommitted changes)' if dirty else ''}"
