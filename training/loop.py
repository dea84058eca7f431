"""The training loop: one forward pass, one summed loss, one step a batch.

Every random draw comes from (seed, epoch or step, rank), never from the state of a generator, so a run stopped at any
step and resumed gives the same numbers as one that was not.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.registry import build_network
from training.augment import DeviceImages
from training.checkpoint import RunError, RunFolder, describe_run
from training.data import ImageSet, Split
from training.objectives import build_objective, network_arguments
from training.processes import Processes
from training.recipe import Recipe
from training.schedule import learning_rate

EVALUATION_ROWS = 500


def network_of(recipe: Recipe, n_classes: int) -> nn.Module:
    arguments = {**recipe.network.arguments, "n_classes": n_classes, **network_arguments(recipe.objective)}
    return build_network(recipe.network.architecture, arguments)


@dataclass
class Progress:
    """How far a run has come; saved with it."""

    step: int = 0
    seconds: float = 0.0


class Trainer:
    """A run in a folder: started anew or resumed from its checkpoint, trained until done or out of time."""

    def __init__(
        self, recipe: Recipe, images: ImageSet, data_path: Path, folder: RunFolder, seed: int, processes: Processes
    ) -> None:
        self.recipe, self.folder, self.seed, self.processes = recipe, folder, seed, processes
        device = processes.device
        torch.manual_seed(seed)  # the initial weights, the same in every process
        network = network_of(recipe, len(images.class_names)).to(device)
        layout = torch.channels_last if recipe.numerics.channels_last else torch.contiguous_format
        self.network = network.to(memory_format=layout)  # type: ignore[call-overload]
        self.wrapped = processes.wrap(self.network)
        self.loss_of = build_objective(recipe.objective)
        o = recipe.optimisation
        self.optimiser = torch.optim.SGD(
            self.network.parameters(), o.learning_rate, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov
        )
        self.progress = Progress()
        description = describe_run(recipe, seed, images.name, data_path, processes.count)
        self.split = self._resume(description) or self._start(description, images)
        padding = recipe.augmentation.crop_padding_px
        normalisation = images.mean, images.std, device
        train, held_out = self.split.train, self.split.held_out
        self.train_images = DeviceImages(images.train_images[train], images.train_labels[train], *normalisation, padding)
        self.held_out = DeviceImages(images.train_images[held_out], images.train_labels[held_out], *normalisation)
        self.steps_per_epoch = -(-len(self.train_images) // o.batch_rows)
        self._order, self._order_epoch = torch.empty(0, dtype=torch.int64), -1

    def _start(self, description: dict[str, Any], images: ImageSet) -> Split:
        split = Split.make(len(images.train_labels), self.recipe.held_out_images, self.seed)
        if self.processes.is_first:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            split.save(self.folder.split)
            self.folder.description.write_text(json.dumps(description, indent=2) + "\n")
        return split

    def _resume(self, description: dict[str, Any]) -> Split | None:
        if not self.folder.checkpoint.is_file():
            return None
        made_by = self.folder.read_description()
        for key in ("recipe", "seed", "processes"):
            if made_by[key] != description[key]:
                raise RunError(
                    f"{self.folder.path}: holds a run with another {key}; resume it with its own, or give another folder"
                )
        state = self.folder.load_checkpoint()
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])
        return Split.load(self.folder.split)

    @property
    def total_steps(self) -> int:
        return self.recipe.optimisation.epochs * self.steps_per_epoch

    def train(self, time_limit_s: float | None = None) -> bool:
        """Train until the last epoch or the time limit, saving a checkpoint after every epoch and on stopping.

        Returns:
            Whether the run is complete; if not, training again with the same folder resumes it exactly.
        """
        began, seconds_before = time.monotonic(), self.progress.seconds
        epoch_losses, epoch_rows, epoch_began = None, 0, began
        with self._bar() as bar:
            while self.progress.step < self.total_steps:
                per_exit, n_rows = self._step(self.progress.step)
                epoch_losses = per_exit if epoch_losses is None else epoch_losses + per_exit
                epoch_rows += n_rows
                self.progress.step += 1
                bar.update(n_rows)
                now = time.monotonic()
                self.progress.seconds = seconds_before + now - began
                finished_epoch = self.progress.step % self.steps_per_epoch == 0
                if finished_epoch:
                    n_steps = max(1, round(epoch_rows / self.recipe.optimisation.batch_rows))
                    self._log(epoch_losses / n_steps, epoch_rows / (now - epoch_began), bar)
                    epoch_losses, epoch_rows, epoch_began = None, 0, time.monotonic()
                out_of_time = time_limit_s is not None and self.processes.any(now - began > time_limit_s)
                if finished_epoch or out_of_time:
                    self._save()
                if out_of_time and self.progress.step < self.total_steps:
                    return False
        return True

    def _batch_rows_of(self, step: int) -> Tensor:
        """Rows of the training images that `step` trains on: an own shuffle for every epoch, shared by all processes."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._order_epoch:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            self._order = torch.randperm(len(self.train_images), generator=generator)
            self._order_epoch = epoch
        size = self.recipe.optimisation.batch_rows
        return self.processes.share(self._order[batch * size : (batch + 1) * size]).to(self.processes.device)

    def _step(self, step: int) -> tuple[Tensor, int]:
        self.wrapped.train()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe.optimisation, step, self.steps_per_epoch)
        draws = torch.Generator(self.processes.device)
        draws.manual_seed((self.seed * 1_000_003 + step) * self.processes.count + self.processes.rank)
        images, labels = self.train_images.augmented(self._batch_rows_of(step), draws)
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            loss, per_exit = self.loss_of(self.wrapped, images, labels)
        loss.backward()
        self.optimiser.step()
        return per_exit, len(labels) * self.processes.count

    def _autocast(self) -> torch.autocast:
        bf16 = self.recipe.numerics.precision == "bf16"
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=bf16)

    @torch.inference_mode()
    def held_out_accuracy(self) -> list[float]:
        """Top-1 accuracy at every exit on the held-out images, which the processes share out."""
        self.network.eval()
        counts = None
        for rows in torch.arange(len(self.held_out)).split(EVALUATION_ROWS)[self.processes.rank :: self.processes.count]:
            images, labels = self.held_out.plain(rows.to(self.processes.device))
            with self._autocast():
                right = torch.stack([(x.argmax(1) == labels).sum() for x in self.network(images)])
            counts = right if counts is None else counts + right
        assert counts is not None, "every process has a share of the held-out images"
        return (self.processes.sum(counts) / len(self.held_out)).tolist()

    def _log(self, losses: Tensor, images_per_s: float, bar: "tqdm[Any]") -> None:
        self.processes.average_buffers(self.network)
        accuracy = self.held_out_accuracy()
        epoch = self.progress.step // self.steps_per_epoch
        record = {
            "epoch": epoch,
            "losses": [round(x, 4) for x in losses.tolist()],
            "held_out_accuracy": [round(x, 4) for x in accuracy],
            "images_per_s": round(images_per_s, 1),
            "seconds": round(self.progress.seconds, 1),
        }
        if self.processes.is_first:
            self.folder.append_log(record)
            percent = " ".join(f"{100 * x:.1f}" for x in accuracy)
            bar.write(f"epoch {epoch}: loss {float(losses.sum()):.3f}, held-out top-1 per exit {percent}")

    def _save(self) -> None:
        self.processes.average_buffers(self.network)
        if self.processes.is_first:
            progress = {"step": self.progress.step, "seconds": self.progress.seconds}
            state = {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict(), "progress": progress}
            self.folder.save_checkpoint(state)

    def _bar(self) -> "tqdm[Any]":
        rows = self.recipe.optimisation.batch_rows
        return tqdm(
            total=self.total_steps * rows,
            initial=self.progress.step * rows,
            unit="image",
            unit_scale=True,
            desc=self.folder.path.name,
            disable=not self.processes.is_first,
        )

