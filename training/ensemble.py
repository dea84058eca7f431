"""Refits the boosted ensemble after training: the weights of each head and of the exits before it.

Training fixes t in F_n = t F_(n-1) + f_n, and leaves overconfident logits, deep exits most. Here the heads stay as
trained, and t_n and s_n in F_n = t_n F_(n-1) + s_n f_n are fitted to held-out images: they minimise the cross-entropy
of exit n, one exit after the other. This is temperature scaling (Guo et al., ICML 2017) of every exit, together with
the best weight of the exit before it: two numbers per exit, which cost nothing to serve.
"""

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from models.boosting import Boosting

# Weight, in images, of a Gaussian prior around the values of training (standard deviation 0.3). Beside thousands of
# images it is negligible; with a few dozen, all answered right, it keeps the scales from growing without limit.
PRIOR_IMAGES = 11.0


class Ensemble(BaseModel):
    """The weights with which the heads' logits are summed; see `models.boosting.Boosting`."""

    model_config = ConfigDict(frozen=True)

    temperatures: tuple[float, ...]
    head_scales: tuple[float, ...]

    def build(self) -> Boosting:
        return Boosting(self.temperatures, scales=self.head_scales)


def fit_ensemble(head_logits: Sequence[Tensor], labels: Tensor, temperatures: Sequence[float]) -> Ensemble:
    """Fit temperatures and scales to images that the heads were not trained on.

    Args:
        head_logits: each head's own logits (not the ensemble's), N of [images, classes].
        labels: int64 [images].
        temperatures: t_1..t_N of training, from which the fit starts.
    """
    fitted: list[tuple[float, float]] = []
    previous = torch.zeros_like(head_logits[0], dtype=torch.float64)
    for logits, temperature in zip(head_logits, (0.0, *temperatures[1:]), strict=True):
        head = logits.double()
        t, s = _fit_exit(previous, head, labels, torch.tensor([temperature, 1.0], dtype=torch.float64))
        fitted.append((t, s))
        previous = t * previous + s * head
    return Ensemble(temperatures=tuple(t for t, _ in fitted), head_scales=tuple(s for _, s in fitted))


def _fit_exit(previous: Tensor, head: Tensor, labels: Tensor, start: Tensor) -> tuple[float, float]:
    """Minimise the cross-entropy of t x previous + s x head over (t, s): a convex problem, solved by L-BFGS."""
    weights = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = functional.cross_entropy(weights[0] * previous + weights[1] * head, labels)
        value = value + PRIOR_IMAGES / (2 * len(labels)) * (weights - start).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    t, s = weights.tolist()
    return t, s
