"""What is minimised. An objective prepares the network it trains and turns a batch into one loss.

boosted   sum of the cross-entropies of the ensembled logits F_n = t_n F_(n-1) + f_n (BoostNet)
joint     the same sum with t = 0: plain multi-exit training, the baseline
weighted  joint, every image's losses weighted by a network that learns beside it which exit it helps (L2W-DEN)

Temperatures may move while training: learned with the network, or on a line to other ones (`temperatures_at`).
"""

from torch import nn

from training.objectives.losses import ExitLosses, Loss
from training.objectives.networks import (
    boosting_of,
    check_image_size,
    freeze_unread,
    network_arguments,
    network_of,
    served,
    temperatures_at,
    trainable,
)
from training.objectives.weighted import WeightedLosses
from training.recipe import Objective

__all__ = [
    "ExitLosses",
    "Loss",
    "WeightedLosses",
    "boosting_of",
    "build_objective",
    "check_image_size",
    "freeze_unread",
    "network_arguments",
    "network_of",
    "served",
    "temperatures_at",
    "trainable",
]


def build_objective(objective: Objective, network: nn.Module | None = None) -> Loss:
    """The loss of an objective; `network` is the `trainable` one: gates are part of it, `weighted` tries steps of it.

    What `weighted` predicts weights with is drawn from torch's generator, as first weights are.
    """
    if objective.name == "weighted":
        assert network is not None
        n_exits = len(boosting_of(network).temperatures)
        return WeightedLosses(network, n_exits, objective.weighting, objective.label_smoothing)
    gates = getattr(network, "gates", None)
    return ExitLosses(
        objective.label_smoothing, objective.distillation, objective.distillation_temperature, objective.gates, gates
    )
