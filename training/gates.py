"""Gates: one more output per earlier exit, trained with the network to predict whether a later exit will be right.

Each gate is a linear layer on the input of its head's last layer. Gates exist in training only: they are removed before
a network's cost is counted and before it is staged; `python -m training signals` evaluates them as exit scores.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class HeadInputs:
    """Keeps the input [rows, width] of every head's last layer in the latest forward pass.

    Args:
        network: of `models.registry`, where each of `heads` ends in a layer called `classifier`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.classifiers: list[nn.Linear] = [head.classifier for head in network.heads]  # type: ignore[union-attr]
        self.kept: dict[int, Tensor] = {}
        self._hooks = [
            classifier.register_forward_pre_hook(partial(self._keep, i))
            for i, classifier in enumerate(self.classifiers)
        ]

    def _keep(self, i: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.kept[i] = inputs[0]

    def take(self) -> list[Tensor]:
        """Return the inputs in order of the exits, and drop the references to them."""
        kept, self.kept = self.kept, {}
        return [kept[i] for i in range(len(self.classifiers))]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Gates(nn.Module):
    """The N - 1 gates of a network with N exits: there is none at the last, which has no exit after it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inputs = HeadInputs(network)
        self.outputs = nn.ModuleList(nn.Linear(c.in_features, 1) for c in self.inputs.classifiers[:-1])

    def forward(self) -> Tensor:
        """Log-odds [N - 1, rows] of `mended`, for the rows of the network's latest forward pass."""
        taken = self.inputs.take()
        return torch.stack([gate(x).squeeze(1) for gate, x in zip(self.outputs, taken, strict=False)])

    def loss(self, exit_logits: list[Tensor], labels: Tensor) -> Tensor:
        """Binary cross-entropy of the gates, summed over them; the targets follow from `exit_logits` and `labels`."""
        return (
            functional.binary_cross_entropy_with_logits(self().float(), mended(exit_logits, labels), reduction="none")
            .mean(1)
            .sum()
        )


@torch.no_grad()
def mended(exit_logits: list[Tensor], labels: Tensor) -> Tensor:
    """1 where an exit is wrong and a later one is right, otherwise 0: float32 [N - 1, rows]."""
    right = torch.stack([x.argmax(1) == labels for x in exit_logits])
    later = torch.stack([right[i + 1 :].any(0) for i in range(len(right) - 1)])
    return (~right[:-1] & later).float()
