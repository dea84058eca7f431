"""Factors near 1 for the channels of a convolution, at which it loses least by being rounded to half precision."""

import torch
from torch import Tensor

MAX_TRIED = 64  # factors above 1, and below
MAX_NUMBERS = 2**23  # rounded to find them: some 0.1 s a convolution


def scales_for(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """By what the outputs of a convolution are to be multiplied, [outputs].

    With each factor a bias is a number of `dtype`, as there are a thousand near every one; or it is so small that its
    error is nothing. Of these it is the one at which the errors of the channel's weights do least.

    Args:
        weight: float32 [outputs, inputs, height, width].
        bias: float32 [outputs]; without one, factors are 1.
    """
    best = torch.ones(len(weight))
    if bias is None or dtype == torch.float32:
        return best
    least = torch.full_like(best, torch.inf)
    n_tried = min(MAX_TRIED, MAX_NUMBERS // (2 * weight.numel()))
    for step in sorted(range(-n_tried, n_tried + 1), key=abs):
        factor = 1.0 + step * torch.finfo(dtype).eps
        exact = (bias * factor).to(dtype).to(bias.dtype) / bias
        is_tiny = bias.abs() < torch.finfo(dtype).smallest_normal
        scales = torch.where(is_tiny | ~exact.isfinite(), factor, exact)
        loss = _loss(weight, scales, dtype)
        best, least = torch.where(loss < least, scales, best), torch.minimum(loss, least)
    return best


def _loss(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding does to outputs, squared, as far as that is known without any image.

    Maps are positive, and pixels beside each other much alike. So errors of weights of one input add up, and those of
    all inputs do as far as these have a mean. What inputs do apart from that goes by the sum of squares.
    """
    by_channel = scales.view(-1, 1, 1, 1)
    scaled = weight * by_channel
    error = ((scaled.to(dtype).to(weight.dtype) - scaled) / by_channel).sum(dim=(2, 3))
    return error.sum(dim=1) ** 2 + (error**2).sum(dim=1)
