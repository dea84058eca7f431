"""What an exit says of every row, worked out where its logits are: `models.exits` in torch.

In float64, as there: it costs next to nothing beside the stage, and scores agree to the last digits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

N_NUMBERS = 3
"""Class, confidence and score: what is told of a row."""


def judge_by_torch(logits: Tensor, score: str, told: Tensor) -> None:
    """What `Kernels.judge` does, in torch.

    In few kernels, since each takes as long as the next however small it is: columns [rows, 1] and no branches; what
    comes of a margin that is no finite number is no number either, and is replaced once, at the end.
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
    told[:, :1].copy_(first)
    torch.nan_to_num(confidence, 0.0, 0.0, 0.0, out=told[:, 1:2])
    torch.nan_to_num(scores, -torch.inf, -torch.inf, -torch.inf, out=told[:, 2:])


class Parts(NamedTuple):
    """What scores are made of, [rows, 1] but for two."""

    margin: Tensor  # between the leading class and the runner-up
    others: Tensor  # [rows, classes]: logits less the runner-up's, the leading one at -inf
    weights: Tensor  # their exp, likewise
    rest: Tensor  # the sum of these
    runner_up: Tensor  # weight of the runner-up, where the leading class has 1
    beside: Tensor  # weight of all but the leading class, likewise
    confidence: Tensor


def _max_softmax(parts: Parts) -> Tensor:
    return parts.margin - parts.rest.log()


def _logit_margin(parts: Parts) -> Tensor:
    return parts.margin


def _probability_margin(parts: Parts) -> Tensor:
    return -(parts.beside + parts.runner_up) * parts.confidence


def _entropy(parts: Parts) -> Tensor:
    # Classes without weight add nothing, though 0 x -inf is no number.
    surprise = torch.where(parts.weights > 0, parts.weights * (parts.others - parts.margin), 0.0)
    return parts.runner_up * surprise.sum(dim=1, keepdim=True) * parts.confidence - parts.beside.log1p()


SCORES: dict[str, Callable[[Parts], Tensor]] = {
    "max_softmax": _max_softmax,
    "logit_margin": _logit_margin,
    "probability_margin": _probability_margin,
    "entropy": _entropy,
}
"""The scores of `models.exits.SCORES`."""
