"""The losses of a batch, one per exit, and their sum, which `joint` and `boosted` minimise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.batches import Batch, Batches
from training.gates import Gates


class Loss(Protocol):
    """The loss that a step minimises. It may have parameters of its own, which it updates before the step."""

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed loss, and statistics [2, exits] without gradient, both float32.

        Labels are class numbers [rows], or shares of the classes [rows, classes].

        The statistics are each exit's mean cross-entropy and its share of valid samples: those that it can still learn
        from, with a loss above the 10th percentile of exit 1's in the batch (BoostNet, Fig. 3).
        """
        ...

    def before(self, step: int, batch: Batch, batches: Batches, optimiser: torch.optim.SGD) -> None:
        """Update the loss's own parameters, before `optimiser` takes its `step` on `batch`."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the `state` of a checkpoint."""
        ...


def losses_by_exit(logits: Sequence[Tensor], labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropies [exits, rows] of the exits' logits."""
    return torch.stack(
        [functional.cross_entropy(x, labels, reduction="none", label_smoothing=label_smoothing) for x in logits]
    )


@torch.no_grad()
def statistics_of(losses: Tensor) -> Tensor:
    """The statistics that `Loss` returns, from losses [exits, rows]."""
    return torch.stack([losses.mean(1), (losses > losses[0].quantile(0.1)).float().mean(1)])


@dataclass(frozen=True)
class ExitLosses:
    """One forward pass, one loss per exit with weight 1 each, one summed loss (BoostNet, section 3).

    Args:
        distillation: weight of a further term per earlier exit: the KL divergence of its softened softmax from the
            last exit's (Hinton et al. 2015); the last exit gets no gradient from it.
        distillation_temperature: divides both exits' logits.
        gates_weight: weight of the loss of `gates`.
    """

    label_smoothing: float = 0.0
    distillation: float = 0.0
    distillation_temperature: float = 2.0
    gates_weight: float = 0.0
    gates: Gates | None = None

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # In float32 even under autocast: a bf16 softmax holds about three digits.
        logits = [x.float() for x in network(images)]
        losses = losses_by_exit(logits, labels, self.label_smoothing)
        total = losses.mean(1).sum()
        if self.distillation and len(logits) > 1:
            total = total + self.distillation * self._divergence(logits)
        if self.gates is not None:
            total = total + self.gates_weight * self.gates.loss(logits, labels)
        return total, statistics_of(losses)

    def before(self, step: int, batch: Batch, batches: Batches, optimiser: torch.optim.SGD) -> None:
        """This loss has no parameters of its own."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """This loss has no state."""

    def _divergence(self, logits: list[Tensor]) -> Tensor:
        t = self.distillation_temperature
        teacher = functional.log_softmax(logits[-1].detach() / t, 1)
        students = torch.stack([functional.log_softmax(x / t, 1) for x in logits[:-1]])
        # Times t squared, so that the size of its gradients does not depend on the temperature.
        return t * t * (teacher.exp() * (teacher - students)).sum(2).mean(1).sum()
