"""A further output per earlier exit, trained with the network: does going on mend this exit's answer?

Each gate is a linear layer on what its head's last layer reads. Gates are of training alone: they are taken off before
a network is counted, staged or served; `python -m training signals` tells what their answers are worth as exit scores.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class HeadInputs:
    """Keeps what the last layer of every head read in the last forward pass, [rows, width] each.

    Args:
        network: of `models.registry`: its `heads` each end in a layer called `classifier`.
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
        """Return them in order of the exits, and hold on to none."""
        kept, self.kept = self.kept, {}
        return [kept[i] for i in range(len(self.classifiers))]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Gates(nn.Module):
    """The gates of a network with N exits: N - 1 of them, since at the last exit nobody goes on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inputs = HeadInputs(network)
        self.outputs = nn.ModuleList(nn.Linear(c.in_features, 1) for c in self.inputs.classifiers[:-1])

    def forward(self) -> Tensor:
        """Log-odds [N - 1, rows] that going on mends the answer, for the rows of the network's last forward pass."""
        taken = self.inputs.take()
        return torch.stack([gate(x).squeeze(1) for gate, x in zip(self.outputs, taken, strict=False)])

    def loss(self, exit_logits: list[Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy of the gates, summed over the exits; `exit_logits` tell, without gradient, what is right."""
        return (
            functional.binary_cross_entropy_with_logits(self().float(), mended(exit_logits, labels), reduction="none")
            .mean(1)
            .sum()
        )


@torch.no_grad()
def mended(exit_logits: list[Tensor], labels: Tensor) -> Tensor:
    """1 where an exit is wrong and a later one is right, else 0: float32 [N - 1, rows]."""
    right = torch.stack([x.argmax(1) == labels for x in exit_logits])
    later = torch.stack([right[i + 1 :].any(0) for i in range(len(right) - 1)])
    return (~right[:-1] & later).float()
