"""Normalisation as a part of stage 1, so that images are transferred to the device as uint8."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Converts decoded images, uint8 [rows, height, width, 3], to network input, float32 [rows, 3, height, width].

    Args:
        mean, std: per channel, of pixel values in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (mean, std))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", (1 / (255 * stds)).float())
        self.register_buffer("shift", (-means / stds).float())

    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2).float() * self.scale + self.shift
