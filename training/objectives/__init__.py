"""Training objectives: each prepares the network that it trains, and computes one loss per batch.

boosted   sum of the cross-entropies of the ensembled logits F_n = t_n F_(n-1) + f_n (BoostNet)
joint     the same sum with t = 0: plain multi-exit training, the baseline
weighted  joint, with each image's losses weighted by a second network that is trained alongside (L2W-DEN)

Temperatures may change in training: learned with the network, or moved linearly to final ones (`temperatures_at`).
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
    """Build an objective's loss for a `trainable` network, which holds the gates and on which `weighted` tries steps.

    The weight predictor of `weighted` is initialised from torch's global generator, as networks are.
    """
    if objective.name == "weighted":
        assert network is not None
        n_exits = len(boosting_of(network).temperatures)
        return WeightedLosses(network, n_exits, objective.weighting, objective.label_smoothing)
    gates = getattr(network, "gates", None)
    return ExitLosses(
        objective.label_smoothing, objective.distillation, objective.distillation_temperature, objective.gates, gates
    )
