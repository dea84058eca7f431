"""Pictures of many sizes to the network's, on the device: what `service.images` does on the host, within a grey level.

A batch of pictures lies in the corners of canvases of one size, so that the program is one and the same for all of
them. A picture is cut to the network's aspect ratio around its centre and scaled in one antialiased (bilinear) step, as
Pillow does it: first along its rows, then along its columns, each rounded to whole grey levels. Each of the two is a
product with a matrix that has a triangle of weights in every row, which the device works out from two numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

N_NUMBERS = 3
"""Of a side: where the cut begins, source pixels for a pixel, and where the picture ends."""

WEIGHT_STEPS = 2**22
"""Pillow's weights are whole numbers of such a part."""


def cut(height_px: int, width_px: int, shape: Sequence[int]) -> list[list[float]]:
    """How a picture is cut and scaled to `shape`: `N_NUMBERS` for its height, then for its width."""
    scale = min(height_px / shape[0], width_px / shape[1])
    return [
        [(side - scale * wanted) / 2, scale, side] for side, wanted in zip((height_px, width_px), shape, strict=False)
    ]


def resize(canvases: Tensor, cuts: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return pictures of one size, uint8 [rows, height, width, 3].

    Args:
        canvases: uint8 [rows, any height, any width, 3].
        cuts: float64 [rows, 2, N_NUMBERS], see `cut`.
        shape: (height, width, ...).
        dtype: of the products. In float64 all is Pillow's to the bit, but where a cut begins between two numbers of
            float32. In float32 a value in 100 (where one grey level is as near as the next) is one off, in float16
            one in 12, and next to none two.
    """
    rows, height, width, channels = canvases.shape
    down, across = (_weights(cuts[:, i], shape[i], canvases.shape[1 + i]).to(dtype) for i in range(2))
    # [rows, columns out, columns in] x [rows, columns in, height x channels]
    pixels = canvases.permute(0, 2, 1, 3).reshape(rows, width, height * channels).to(dtype)
    narrow = _levels(across @ pixels).view(rows, shape[1], height, channels)
    pixels = narrow.permute(0, 2, 1, 3).reshape(rows, height, shape[1] * channels)
    return _levels(down @ pixels).view(rows, shape[0], shape[1], channels).to(torch.uint8)


def _weights(cuts: Tensor, n_out: int, n_in: int) -> Tensor:
    """What every pixel of a side is made of, float64 [rows, n_out, n_in]."""
    start, scale, end = (cuts[:, i, None, None] for i in range(N_NUMBERS))
    out, source = (torch.arange(n, dtype=cuts.dtype, device=cuts.device) + 0.5 for n in (n_out, n_in))
    centres = start + out[None, :, None] * scale
    triangles = (1 - (source - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    triangles = torch.where(source < end, triangles, 0.0)  # of the picture, not of the rest of its canvas
    shares = triangles / triangles.sum(dim=2, keepdim=True)
    return (shares * WEIGHT_STEPS + 0.5).floor() / WEIGHT_STEPS


def _levels(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)
