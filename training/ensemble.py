"""The boosted ensemble, fitted once more after training: how much of the exits before an exit's answer takes in.

Training fixes t in F_n = t F_(n-1) + f_n, and leaves logits that are too sure of themselves, deep exits most. Held-out
images tell better: with the heads as trained, F_n = t_n F_(n-1) + s_n f_n, where t_n and s_n minimise the cross-entropy
of exit n, one exit after the other. That is temperature scaling (Guo et al., ICML 2017) of every exit and, of the one
before it, its best weight: two numbers an exit, which cost nothing to serve.
"""

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from models.boosting import Boosting

# Of a Gaussian prior about the values of training, in images: 0.3 is one standard deviation. So many images tell
# nothing against thousands, and keep a few dozen, all of them answered right, from driving the scales to infinity.
PRIOR_IMAGES = 11.0


class Ensemble(BaseModel):
    """What the heads' logits are summed up with; see `models.boosting.Boosting`."""

    model_config = ConfigDict(frozen=True)

    temperatures: tuple[float, ...]
    head_scales: tuple[float, ...]

    def build(self) -> Boosting:
        return Boosting(self.temperatures, scales=self.head_scales)


def fit_ensemble(head_logits: Sequence[Tensor], labels: Tensor, temperatures: Sequence[float]) -> Ensemble:
    """Fit temperatures and scales to images that the heads were not trained on.

    Args:
        head_logits: of N heads, each [images, classes], not summed up.
        labels: int64 [images].
        temperatures: those of training, t_1..t_N, from which the fit starts.
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
    """Minimise the cross-entropy of t x previous + s x head over (t, s): convex, so a few Newton-like steps do."""
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
