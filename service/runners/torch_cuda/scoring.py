"""What an exit says of every row, worked out where its logits are: `models.exits` in torch.

In float64, as there: it costs next to nothing beside the stage, and scores agree to the last digits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

N_NUMBERS = 3
"""Class, confidence and score: what is told of a row."""


def judge(logits: Tensor, score: str) -> Tensor:
    """Return class, `models.exits.confidence` and score of logits [rows, classes], float64 [rows, N_NUMBERS].

    Args:
        score: a key of `SCORES`.
    """
    wide = logits.double()
    (top, second), (first, _) = (part.unbind(1) for part in wide.topk(2, dim=1))
    margin = top - second
    others = wide.scatter(1, first[:, None], -torch.inf) - second[:, None]  # relative to the runner-up
    weights = others.exp()
    rest = weights.sum(dim=1)
    runner_up = (-margin).exp()
    confidence = 1.0 / (1.0 + runner_up * rest)
    scores = SCORES[score](margin, others, weights, rest, runner_up)
    finite = margin.isfinite()
    return torch.stack(
        [
            first.double(),
            torch.where(finite & confidence.isfinite(), confidence, 0.0),
            torch.where(finite & scores.isfinite(), scores, -torch.inf),
        ],
        dim=1,
    )


def _max_softmax(margin: Tensor, others: Tensor, weights: Tensor, rest: Tensor, runner_up: Tensor) -> Tensor:
    return margin - rest.log()


def _logit_margin(margin: Tensor, others: Tensor, weights: Tensor, rest: Tensor, runner_up: Tensor) -> Tensor:
    return margin


def _probability_margin(margin: Tensor, others: Tensor, weights: Tensor, rest: Tensor, runner_up: Tensor) -> Tensor:
    beside = runner_up * rest
    return -(beside + runner_up) / (1.0 + beside)


def _entropy(margin: Tensor, others: Tensor, weights: Tensor, rest: Tensor, runner_up: Tensor) -> Tensor:
    # Classes without weight add nothing, though 0 x -inf is no number.
    surprise = torch.where(weights > 0, weights * (others - margin[:, None]), 0.0)
    beside = runner_up * rest
    return runner_up * surprise.sum(dim=1) / (1.0 + beside) - beside.log1p()


SCORES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "max_softmax": _max_softmax,
    "logit_margin": _logit_margin,
    "probability_margin": _probability_margin,
    "entropy": _entropy,
}
"""The scores of `models.exits.SCORES`, of: margin [rows], the others less the runner-up [rows, classes] (the top one at
-inf), their exp, its sum [rows], and exp(-margin)."""
