"""Class, confidence and score of every row, computed on the device: `models.exits` in torch.

In float64, as there: it costs next to nothing compared with the stage, and scores agree to the last digits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

N_NUMBERS = 3
"""Per row: class, confidence and score; see `base.Heads`."""


def judge_by_torch(logits: Tensor, score: str, heads: Tensor) -> None:
    """The same as `Kernels.judge`, in torch.

    It launches few kernels, as each takes the same time however small it is: columns [rows, 1] and no branches. If the
    margin is not finite, it becomes NaN and so do the results, which are replaced once, at the end.
    """
    wide = logits.to(torch.float64, copy=True)
    (top, second), (first, _) = (part.split(1, dim=1) for part in wide.topk(2, dim=1))
    margin = (top - second).nan_to_num(torch.nan, torch.nan, torch.nan)
    others = wide.scatter_(1, first, -torch.inf) - second  # relative to the runner-up
    weights = others.exp()
    rest = weights.sum(dim=1, keepdim=True)
    runner_up = margin.neg().exp()
    beside = runner_up * rest
    confidence = (1.0 + beside).reciprocal()
    scores = SCORES[score](Parts(margin, others, weights, rest, runner_up, beside, confidence))
    heads[:, :1].copy_(first)
    torch.nan_to_num(confidence, 0.0, 0.0, 0.0, out=heads[:, 1:2])
    torch.nan_to_num(scores, -torch.inf, -torch.inf, -torch.inf, out=heads[:, 2:])


class Parts(NamedTuple):
    """What scores are computed from, [rows, 1] unless noted."""

    margin: Tensor  # between the leading class and the runner-up
    others: Tensor  # [rows, classes]: logits minus the runner-up's; -inf for the leading class
    weights: Tensor  # [rows, classes]: exp of `others`
    rest: Tensor  # the sum of `weights`
    runner_up: Tensor  # the weight of the runner-up if that of the leading class is 1
    beside: Tensor  # the weight of all classes but the leading one, on the same scale
    confidence: Tensor


def _max_softmax(parts: Parts) -> Tensor:
    return parts.margin - parts.rest.log()


def _logit_margin(parts: Parts) -> Tensor:
    return parts.margin


def _probability_margin(parts: Parts) -> Tensor:
    return -(parts.beside + parts.runner_up) * parts.confidence


def _entropy(parts: Parts) -> Tensor:
    # Classes without weight add nothing, but 0 x -inf would be NaN.
    surprise = torch.where(parts.weights > 0, parts.weights * (parts.others - parts.margin), 0.0)
    return parts.runner_up * surprise.sum(dim=1, keepdim=True) * parts.confidence - parts.beside.log1p()


SCORES: dict[str, Callable[[Parts], Tensor]] = {
    "max_softmax": _max_softmax,
    "logit_margin": _logit_margin,
    "probability_margin": _probability_margin,
    "entropy": _entropy,
}
"""The scores of `models.exits.SCORES`."""
