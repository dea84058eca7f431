"""Images on the training device, augmented there a batch at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class DeviceImages:
    """Labelled images resident on a device as uint8, handed out as normalised float batches.

    Args:
        images: uint8 [images, height, width, 3].
        labels: int64 [images].
        mean, std: per channel, of images scaled to [0, 1].
        padding_px: black border that random crops may reach into (CIFAR: 4); 0 crops nothing.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        padding_px: int = 0,
    ) -> None:
        self.labels = torch.from_numpy(labels).to(device)
        self.height_px, self.width_px = images.shape[1:3]
        self.padding_px = padding_px
        border = (0, 0, padding_px, padding_px, padding_px, padding_px)
        self.padded = functional.pad(torch.from_numpy(images).to(device), border)
        self.scale = (1.0 / (255.0 * torch.tensor(std, device=device))).float()
        self.shift = (-torch.tensor(mean, device=device) / torch.tensor(std, device=device)).float()

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The test transform: rows as they are, normalised. Returns float32 [rows, 3, height, width] and labels."""
        p = self.padding_px
        images = self.padded[rows, p : p + self.height_px, p : p + self.width_px]
        return self._normalised(images), self.labels[rows]

    def augmented(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random crop out of the padded image and a horizontal flip with probability 0.5, drawn for every row."""
        n, device = len(rows), self.padded.device
        offsets = torch.randint(0, 2 * self.padding_px + 1, (2, n, 1), generator=generator, device=device)
        flips = torch.randint(0, 2, (n, 1), generator=generator, device=device, dtype=torch.bool)
        ys = offsets[0] + torch.arange(self.height_px, device=device)
        columns = torch.arange(self.width_px, device=device)
        xs = offsets[1] + torch.where(flips, columns.flip(0), columns)
        return self._normalised(self.padded[rows[:, None, None], ys[:, :, None], xs[:, None, :]]), self.labels[rows]

    def _normalised(self, images: Tensor) -> Tensor:
        # [rows, height, width, 3] seen as [rows, 3, height, width] is already channels-last: nothing is copied.
        return (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)
