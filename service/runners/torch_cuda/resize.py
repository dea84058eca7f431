"""Scales images of any size to the network's on the device, within a grey level of what `service.images` does.

The images of a batch lie in the corners of canvases of one size, so that one program serves all sizes. Each is cropped
to the network's aspect ratio around its centre and scaled in one antialiased (bilinear) step, as Pillow does it: first
along its rows, then along its columns, rounding to whole grey levels after each. Each of the two is a product with a
matrix whose rows are triangles of weights. The device computes the matrix from `N_NUMBERS` numbers per side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

N_NUMBERS = 3
"""Per side: where the crop begins, source pixels per output pixel, and where the image ends."""

WEIGHT_STEPS = 2**22
"""Pillow's weights are multiples of 1 / WEIGHT_STEPS."""


def cut(height_px: int, width_px: int, shape: Sequence[int]) -> list[list[float]]:
    """How an image is cropped and scaled to `shape`: `N_NUMBERS` for its height, then for its width."""
    scale = min(height_px / shape[0], width_px / shape[1])
    return [
        [(side - scale * wanted) / 2, scale, side] for side, wanted in zip((height_px, width_px), shape, strict=False)
    ]


def resize(canvases: Tensor, cuts: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Crop and scale images; returns uint8 [rows, height, width, 3].

    Args:
        canvases: uint8 [rows, any height, any width, 3].
        cuts: float64 [rows, 2, N_NUMBERS], see `cut`.
        shape: (height, width, ...).
        dtype: of the products. In float64, results are bit-exact with Pillow's unless the start of a crop is not a
            float32. In float32, one value in 100 is off by one grey level (where two are about equally near), in
            float16 one in 12; hardly any is off by two.
    """
    rows, height, width, channels = canvases.shape
    down, across = (_weights(cuts[:, i], shape[i], canvases.shape[1 + i]).to(dtype) for i in range(2))
    # [rows, columns out, columns in] x [rows, columns in, height x channels]
    pixels = canvases.permute(0, 2, 1, 3).reshape(rows, width, height * channels).to(dtype)
    narrow = _levels(across @ pixels).view(rows, shape[1], height, channels)
    pixels = narrow.permute(0, 2, 1, 3).reshape(rows, height, shape[1] * channels)
    return _levels(down @ pixels).view(rows, shape[0], shape[1], channels).to(torch.uint8)


def _weights(cuts: Tensor, n_out: int, n_in: int) -> Tensor:
    """The weight of each source pixel in each output pixel of a side, float64 [rows, n_out, n_in]."""
    start, scale, end = (cuts[:, i, None, None] for i in range(N_NUMBERS))
    out, source = (torch.arange(n, dtype=cuts.dtype, device=cuts.device) + 0.5 for n in (n_out, n_in))
    centres = start + out[None, :, None] * scale
    triangles = (1 - (source - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    triangles = torch.where(source < end, triangles, 0.0)  # nothing from the canvas outside the image
    shares = triangles / triangles.sum(dim=2, keepdim=True)
    return (shares * WEIGHT_STEPS + 0.5).floor() / WEIGHT_STEPS


def _levels(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)
