"""Rounds the weights of a convolution to half precision with the least error in its outputs.

There are two degrees of freedom: a factor near 1 per output channel, by which the layers that read it divide, and the
rounding direction of each weight. Both are chosen to minimise `_loss`, without any images.
"""

import torch
from torch import Tensor

MAX_TRIED = 64  # factors above 1, and as many below
MAX_NUMBERS = 2**23  # weights rounded to find factors: some 0.1 s per convolution
AT_ONCE = 2**16  # weights: in small convolutions, the overhead of torch's calls dominates
ROUNDS = 2
MOST_TURNED = 8  # weights per output in each round


def scales_for(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the factors by which to multiply the outputs of a convolution, [outputs].

    Times its factor, a bias is exactly a number of `dtype` (a thousand are near every bias), or too small for its error
    to matter. Of such factors, the one is chosen at which rounding the channel's weights costs least.

    Args:
        weight: float32 [outputs, inputs, height, width].
        bias: float32 [outputs]; without one, factors are 1.
    """
    best = torch.ones(len(weight))
    if bias is None or dtype == torch.float32:
        return best
    least = torch.full_like(best, torch.inf)
    is_tiny = bias.abs() < torch.finfo(dtype).smallest_normal
    n_tried = min(MAX_TRIED, MAX_NUMBERS // (2 * weight.numel()))
    nearest_first = torch.tensor(sorted(range(-n_tried, n_tried + 1), key=abs))
    factors = 1.0 + nearest_first[:, None] * torch.finfo(dtype).eps
    for some in factors.split(max(1, AT_ONCE // weight.numel())):
        exact = (bias * some).to(dtype).to(bias.dtype) / bias
        scales = torch.where(is_tiny | ~exact.isfinite(), some, exact)  # [tried, outputs]
        scaled = (weight * scales[:, :, None, None, None]).flatten(3)
        losses = _loss(scaled.to(dtype).to(weight.dtype) - scaled) / scales**2
        loss, which = losses.nan_to_num(nan=torch.inf, posinf=torch.inf).min(dim=0)
        scale = scales.gather(0, which[None])[0]
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a weight to numbers of `dtype`, returned as float32: each to one of its two neighbours, mostly the nearer.

    Weights that are about equally near to both are turned to the other one if that makes errors cancel: first within
    each input, then over all inputs.

    Args:
        weight: float32 [outputs, inputs, height, width].
    """
    exact = weight.flatten(2)
    error = exact.to(dtype).to(weight.dtype) - exact
    turn = (exact + error - error.sign() * _spacing(exact, dtype)).to(dtype).to(weight.dtype) - (exact + error)
    for _ in range(ROUNDS if exact.shape[2] > 1 else 0):
        gain, which = _cost(error, turn).min(dim=2, keepdim=True)
        error, turn = _turned(error, turn, torch.zeros_like(turn, dtype=torch.bool).scatter(2, which, gain < 0))
    for _ in range(ROUNDS):
        total = error.sum(dim=(1, 2))[:, None]
        cost = _cost(error, turn)
        helps = turn * total[:, :, None] < 0
        dearness = torch.where(helps, cost / turn.abs(), torch.inf).flatten(1)
        dearness, which = dearness.topk(min(MOST_TURNED, dearness.shape[1]), largest=False)
        helps = dearness.isfinite()
        first = (turn.flatten(1).gather(1, which) * helps).cumsum(dim=1)  # the first 1, 2, 3, ... of them
        costs = (cost.flatten(1).gather(1, which) * helps).cumsum(dim=1)
        gain, last = ((total + first) ** 2 - total**2 + costs).min(dim=1, keepdim=True)
        chosen = (torch.arange(which.shape[1]) <= last) & (gain < 0) & helps
        turns = torch.zeros_like(turn, dtype=torch.bool).flatten(1).scatter(1, which, chosen).view_as(turn)
        error, turn = _turned(error, turn, turns)
    return (exact + error).to(dtype).to(weight.dtype).view_as(weight)


def _loss(error: Tensor) -> Tensor:
    """An estimate of the squared error of outputs, from errors of weights [..., outputs, inputs, pixels].

    Maps are positive and neighbouring pixels similar. So the errors of the weights of one input add up, and those of
    all inputs add up as far as inputs share a mean. What pixels vary beyond that contributes the sum of squares.
    """
    by_input = error.sum(dim=-1)
    return by_input.sum(dim=-1) ** 2 + (by_input**2).sum(dim=-1) + (error**2).sum(dim=(-2, -1))


def _cost(error: Tensor, turn: Tensor) -> Tensor:
    """The change of `_loss`, without its first term, if the error of one weight changes by `turn` and no other does."""
    return turn * (2 * error.sum(dim=2, keepdim=True) + turn) + turn * (2 * error + turn)


def _turned(error: Tensor, turn: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(which, error + turn, error), torch.where(which, -turn, turn)


def _spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the numbers of `dtype` around x."""
    known = torch.finfo(dtype)
    return known.eps * torch.exp2(x.abs().clamp_min(known.smallest_normal).log2().floor())
