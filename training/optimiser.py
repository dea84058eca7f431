"""The optimiser of a recipe."""

from typing import Any

import torch
from torch import nn

from training.recipe import Optimisation


def optimiser_of(network: nn.Module, o: Optimisation) -> torch.optim.SGD:
    """SGD in one pass over the weights; decay spares learned temperatures, which it would pull to 1/2."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (spared if name.startswith("boosting.") else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups if spared else decayed,
        o.learning_rate,
        o.momentum,
        weight_decay=o.weight_decay,
        nesterov=o.nesterov,
        fused=True,
    )
