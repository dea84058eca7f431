"""The optimiser of a recipe."""

from typing import Any

import torch
from torch import Tensor, nn

from training.recipe import Optimisation


def optimiser_of(network: nn.Module, o: Optimisation) -> torch.optim.SGD:
    """Fused SGD. Learned temperatures have no weight decay, which would pull them to 1/2."""
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


def after_step(optimiser: torch.optim.SGD, gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Return the weights after the optimiser's next step with these gradients, without taking it.

    Learning rate, weight decay and momentum are the current ones. The result is differentiable in `gradients`.
    """
    moved = {}
    for group in optimiser.param_groups:
        for p in group["params"]:
            if p not in gradients:
                continue
            gradient = gradients[p] + group["weight_decay"] * p.detach()
            momentum, buffer = group["momentum"], optimiser.state.get(p, {}).get("momentum_buffer")
            velocity = gradient if buffer is None else momentum * buffer + gradient
            moved[p] = p.detach() - group["lr"] * (gradient + momentum * velocity if group["nesterov"] else velocity)
    return moved
