"""The training loop: per batch one forward pass, one summed loss and one optimiser step.

Every random draw comes from (seed, epoch or step, rank), never from the state of a generator, so a run stopped at any
step and resumed gives the same numbers as an uninterrupted one.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from training.augment import DeviceImages
from training.averaging import Averaging
from training.batches import Batches
from training.checkpoint import Progress, RunError, RunFolder, describe_run
from training.image_set import DataError, ImageSet, Split
from training.numerics import Precision, autocast, precision_of
from training.objectives import (
    boosting_of,
    build_objective,
    check_image_size,
    freeze_unread,
    network_of,
    temperatures_at,
    trainable,
)
from training.optimiser import optimiser_of
from training.processes import Processes, StopRequest
from training.recipe import Recipe, changes
from training.schedule import learning_rate
from training.starting import identity_of, start_from, training_of
from training.telling import diverged, epoch_line, images_left, speed

EVALUATION_ROWS = 500
CHECKED_STEPS = 50  # between checks that the loss is finite; each check synchronises with a GPU


class Trainer:
    """A run in a folder: starts it or resumes it from its checkpoint, and trains until done or stopped.

    Args:
        images: the image set; of its training images, the recipe's `held_out_images` are held out.
        seed: of the split, the initial weights, the order of images and the augmentation.
        command: the command line, recorded in run.json.
        start: a bundle with the initial weights; by default they are random.

    Raises:
        RunError: the folder is damaged or holds a run with another recipe, seed, image set, number of processes or
            start; or the bundle's weights don't fit, or were trained on images to be held out.
        RecipeError: the recipe's network or objective can't be built, or doesn't take images of this size.
        DataError: the images don't fit the recipe, or are not those of the run that is resumed.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: ImageSet,
        folder: RunFolder,
        seed: int,
        processes: Processes,
        command: str = "",
        start: Path | None = None,
    ) -> None:
        self.start = start
        self.recipe, self.folder, self.seed, self.processes = recipe, folder, seed, processes
        device, o = processes.device, recipe.optimisation
        torch.manual_seed(seed)  # the initial weights, the same in every process
        network = network_of(recipe, len(images.class_names))
        for size_px in {images.image_size_px, *recipe.augmentation.sizes_px}:
            check_image_size(network, size_px)
        network = trainable(network, recipe.objective).to(device)
        layout = torch.channels_last if recipe.numerics.channels_last else torch.contiguous_format
        self.network = network.to(memory_format=layout)  # type: ignore[call-overload]
        self.averaging = Averaging(self.network, o.ema_decay)
        self.loss_of = build_objective(recipe.objective, self.network)
        self.optimiser = optimiser_of(self.network, o)
        self.progress = Progress()
        self.precision: Precision = precision_of(recipe.numerics, device)
        self.split = self._resume(images) if folder.checkpoint.is_file() else self._start(images, command)
        train, held_out = self.split.train, self.split.held_out
        normalisation = images.mean, images.std, device
        a = recipe.augmentation
        self.train_images = DeviceImages(
            images.train_images[train],
            images.train_labels[train],
            *normalisation,
            a.crop_padding_px,
            a.crop_area,
            a.cutout_px,
            a.cutmix,
            len(images.class_names),
        )
        self.held_out = DeviceImages(images.train_images[held_out], images.train_labels[held_out], *normalisation)
        self.batches = Batches(self.train_images, recipe, seed, processes)
        self.steps_per_epoch, self.total_steps = self.batches.steps_per_epoch, self.batches.total_steps
        if self.steps_per_epoch == 0 or o.batch_rows < 4 * processes.count or len(held_out) < processes.count:
            raise DataError(
                f"{len(train)} training and {len(held_out)} held-out images, batches of {o.batch_rows} rows and "
                f"{processes.count} processes don't go together: give more images, a batch_rows of at most the number "
                "of training images and at least four per process, or fewer processes"
            )
        if recipe.objective.name == "weighted" and self.steps_per_epoch == 1:
            raise DataError(
                "objective.name = 'weighted' needs at least two batches an epoch: set "
                f"batch_rows to {len(train) // 2} or less"
            )
        if recipe.numerics.compile != "off":
            self.network.compile(mode=recipe.numerics.compile, dynamic=False)  # in place: its weights keep their names
        freeze_unread(self.network, images.image_size_px)
        self.wrapped = processes.wrap(self.network)

    def _start(self, images: ImageSet, command: str) -> Split:
        split = Split.make(len(images.train_labels), self.recipe.held_out_images, self.seed)
        if self.start is not None:
            start_from(self.start, self.network, images, split)
        if self.processes.is_first:
            data = images.described(split)
            description = describe_run(self.recipe, self.seed, data, self.processes.count, command)
            description["precision"] = self.precision
            if self.start is not None:
                description["from"] = identity_of(self.start)
                description["before"] = training_of(self.start)
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.folder.forget_calibration()  # left over if a run's checkpoint was removed
            self.folder.head_inputs.unlink(missing_ok=True)
            self.folder.trim_log(0)
            split.save(self.folder.split)
            self.folder.description.write_text(json.dumps(description, indent=2) + "\n")
        return split

    def _resume(self, images: ImageSet) -> Split:
        if not self.folder.description.is_file():
            raise RunError(
                f"{self.folder.path}: has a checkpoint.pt, but no run.json that tells what made it; restore that, or "
                "give another folder"
            )
        made_by = self.folder.read_description()
        data = {"images_sha256": images.sha256, "image_size_px": images.image_size_px, **made_by["data"]}
        changed = changes(self.folder.read_recipe(), self.recipe)
        same = {
            f"recipe ({'; '.join(changed)})": not changed,
            "seed": made_by["seed"] == self.seed,
            "number of processes": made_by["processes"] == self.processes.count,
            "image set": data["name"] == images.name,
            "--image-size": data["image_size_px"] == images.image_size_px,
            "list of training images": data["images_sha256"] == images.sha256,
            "start": made_by.get("from") == (None if self.start is None else identity_of(self.start)),
        }
        for what, is_same in same.items():
            if not is_same:
                raise RunError(f"{self.folder.path}: holds a run with another {what}; give the same, or another folder")
        self.precision = made_by.get("precision", self.precision)  # `auto` might resolve differently on this machine
        split = Split.load(self.folder.split, len(images.train_labels))
        state = self.folder.load_checkpoint()
        self.folder.restore_weights(self.network, state)
        self.averaging.restore(state)
        self.loss_of.restore(state)
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress.of(state["progress"])
        return split

    def train(self, time_limit_s: float | None = None) -> Literal["finished", "time limit", "signal"]:
        """Train to the last epoch, until the time limit, or until SIGINT or SIGTERM; return which ended it.

        A checkpoint is saved after every epoch and on stopping; a later run in the same folder resumes from it.
        """
        progress = self.progress
        if self.processes.is_first:
            self.folder.trim_log(progress.step // self.steps_per_epoch)
        sums = torch.tensor(progress.epoch_sums or 0.0, device=self.processes.device)  # over the current epoch
        began, seconds_before = time.monotonic(), progress.seconds
        epoch_began, epoch_rows = began, 0
        with self._bar() as bar, StopRequest() as request:
            while progress.step < self.total_steps:
                statistics, n_rows = self._step(progress.step)
                sums = sums + statistics
                epoch_rows += n_rows
                progress.step += 1
                bar.update(self.batches.rows_before(progress.step) - bar.n)
                now = time.monotonic()
                progress.seconds = seconds_before + now - began
                finished_epoch = progress.step % self.steps_per_epoch == 0
                if finished_epoch:
                    self._check_finite(sums)
                    self._log(self._mean(sums) / self.steps_per_epoch, epoch_rows / (now - epoch_began), bar)
                    sums, epoch_rows, epoch_began = torch.zeros_like(sums), 0, time.monotonic()
                out_of_time = time_limit_s is not None and now - began > time_limit_s
                stopping = self.processes.any(out_of_time or request.received)
                if stopping or progress.step % CHECKED_STEPS == 0:
                    self._check_finite(sums)
                if finished_epoch or stopping:
                    progress.epoch_sums = self._mean(sums).tolist()
                    self._save()
                if stopping and progress.step < self.total_steps:
                    return "signal" if self.processes.any(request.received) else "time limit"
        return "finished"

    def _check_finite(self, sums: Tensor) -> None:
        weights = torch.stack([weight.detach().sum() for weight in self.network.parameters()])
        if not self.processes.sum(torch.cat([sums.flatten(), weights])).isfinite().all():  # waits for a GPU
            rate = self.recipe.optimisation.learning_rate
            raise diverged(self.folder, self.progress.step, self.total_steps, rate)

    def _mean(self, values: Tensor) -> Tensor:
        return self.processes.sum(values) / self.processes.count

    def _step(self, step: int) -> tuple[Tensor, int]:
        self.wrapped.train()
        self._move_temperatures(step)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe.optimisation, step, self.steps_per_epoch)
        images, labels = self.batches[step]
        self.loss_of.before(step, (images, labels), self.batches, self.optimiser)
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            loss, statistics = self.loss_of(self.wrapped, images, labels)
        loss.backward()
        self.optimiser.step()
        self.averaging.update()
        return statistics, len(labels) * self.processes.count

    def _move_temperatures(self, step: int) -> None:
        """If the recipe has final temperatures, set those of `step`, on the line from the first ones to the last."""
        share = step / max(1, self.total_steps - 1)
        moved = temperatures_at(self.recipe.objective, len(boosting_of(self.network).temperatures), share)
        if moved is not None:
            for network in (self.network, self.averaging.evaluated):
                boosting_of(network).temperatures = moved
            self.progress.temperatures = list(moved)

    def _autocast(self) -> torch.autocast:
        return autocast(self.precision, self.processes.device)

    @torch.inference_mode()
    def held_out_accuracy(self) -> list[float]:
        """Top-1 accuracy at every exit on the held-out images, which are divided among the processes."""
        network = self.averaging.evaluated.eval()
        own = torch.arange(len(self.held_out))[self.processes.rank :: self.processes.count].to(self.processes.device)
        n_right = []
        for rows in own.split(EVALUATION_ROWS):
            images, labels = self.held_out.plain(rows)
            with self._autocast():
                n_right.append(torch.stack([(x.argmax(1) == labels).sum() for x in network(images)]))
        accuracy = self.processes.sum(torch.stack(n_right).sum(0)) / len(self.held_out)
        return [round(x, 4) for x in accuracy.tolist()]

    def _log(self, statistics: Tensor, images_per_s: float, bar: "tqdm[Any]") -> None:
        self._average_buffers()
        accuracy = self.held_out_accuracy()
        epoch, epochs = self.progress.step // self.steps_per_epoch, self.recipe.optimisation.epochs
        losses, valid_shares = statistics
        record = {
            "epoch": epoch,
            "losses": [round(x, 4) for x in losses.tolist()],
            "valid_shares": [round(x, 4) for x in valid_shares.tolist()],
            "held_out_accuracy": accuracy,
            "images_per_s": round(images_per_s, 1),
            "seconds": round(self.progress.seconds, 1),
        }
        if self.recipe.objective.temperatures_move:
            temperatures = boosting_of(self.averaging.evaluated).temperatures
            record["temperatures"] = [round(t, 4) for t in temperatures]
        if self.processes.is_first:
            self.folder.append_log(record)
            left = self._images_left()
            bar.write(epoch_line(epoch, epochs, losses.tolist(), accuracy, speed(images_per_s, left)))

    def _images_left(self) -> float:
        rows = self.batches.rows_before(self.steps_per_epoch) / self.steps_per_epoch
        size_px = self.train_images.height_px
        return images_left(self.recipe.augmentation, self.progress.step, self.total_steps, rows, size_px)

    def _save(self) -> None:
        self._average_buffers()
        if self.processes.is_first:
            optimiser, progress = self.optimiser.state_dict(), asdict(self.progress)
            kept = {**self.averaging.state(), **self.loss_of.state(), "optimiser": optimiser, "progress": progress}
            self.folder.save_checkpoint(kept)

    def _average_buffers(self) -> None:
        self.processes.average_buffers(self.network)
        if self.averaging.evaluated is not self.network:
            self.processes.average_buffers(self.averaging.evaluated)

    def _bar(self) -> "tqdm[Any]":
        """Progress in images, with rate and time left; shown on a terminal only (elsewhere, one line per epoch)."""
        return tqdm(
            total=self.batches.rows_before(self.total_steps),
            initial=self.batches.rows_before(self.progress.step),
            unit="image",
            unit_scale=True,
            desc=self.folder.path.name,
            disable=None if self.processes.is_first else True,
        )
