"""The batches of a run: their images and augmentation are a function of (seed, step, rank)."""

import torch
from torch import Tensor

from training.augment import DeviceImages
from training.processes import Processes
from training.recipe import Recipe

Batch = tuple[Tensor, Tensor]  # images [rows, 3, height, width] and labels, as `DeviceImages.augmented` gives them


class Batches:
    """This process's rows of every batch of a run; `batches[step]` is the same at every call.

    Args:
        images: those to train on.
        seed: of their order and augmentation.
    """

    def __init__(self, images: DeviceImages, recipe: Recipe, seed: int, processes: Processes) -> None:
        self.images, self.seed, self.processes = images, seed, processes
        self.n_rows = recipe.optimisation.batch_rows  # over all processes
        self.steps_per_epoch = recipe.optimisation.steps_per_epoch(len(images))
        self.total_steps = recipe.optimisation.epochs * self.steps_per_epoch
        self._augmentation = recipe.augmentation
        self._order, self._order_epoch = torch.empty(0, dtype=torch.int64), -1

    def __getitem__(self, step: int) -> Batch:
        draws = torch.Generator(self.processes.device)
        draws.manual_seed((self.seed * 1_000_003 + step) * self.processes.count + self.processes.rank)
        size_px = self._augmentation.size_px(step, self.total_steps)
        return self.images.augmented(self.rows_of(step), draws, size_px)

    def rows_of(self, step: int) -> Tensor:
        """Indices of the images for this process in `step`; every epoch is shuffled anew, alike in all processes."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._order_epoch:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            self._order = torch.randperm(len(self.images), generator=generator)
            self._order_epoch = epoch
        rows = self._order[batch * self.n_rows : (batch + 1) * self.n_rows]
        return self.processes.share(rows).to(self.processes.device)

    def rows_before(self, step: int) -> int:
        """How many images the steps before `step` train on, over all processes."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return epoch * min(len(self.images), self.steps_per_epoch * self.n_rows) + batch * self.n_rows

    def partner(self, step: int) -> int:
        """The step in the same epoch whose batch forms a pair with that of `step`: 0 with 1, 2 with 3, and so on.

        If the number of steps is odd, the last one gets the one before it, whose own partner is another step.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        other = batch ^ 1
        return epoch * self.steps_per_epoch + (other if other < self.steps_per_epoch else batch - 1)
