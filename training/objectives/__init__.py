"""What is minimised. An objective prepares the network it trains and turns a batch into one loss.

boosted   sum of the cross-entropies of the ensembled logits F_n = t_n F_(n-1) + f_n (BoostNet)
joint     the same sum with t = 0: plain multi-exit training, the baseline

Temperatures may move while training: learned with the network, or on a line to other ones (`temperatures_at`).
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.boosting import Boosting, temperatures_per_exit
from models.registry import build_network
from training.gates import Gates
from training.recipe import Objective, Recipe, RecipeError

SIZES_PX = range(32, 513, 32)  # that are tried for a network that does not take the one it is given


def network_arguments(recipe: Recipe, n_classes: int) -> dict[str, Any]:
    """Arguments of the network that a recipe trains (see `models.registry`): its own, and those its objective sets."""
    objective = recipe.objective
    return {
        **recipe.network.arguments,
        "n_classes": n_classes,
        "temperatures": objective.temperatures if objective.name == "boosted" else [0.0],
        "gradient_rescaling": objective.gradient_rescaling,
        "stop_gradient": objective.stop_gradient,
    }


def network_of(recipe: Recipe, n_classes: int) -> nn.Module:
    """Build the network that a recipe trains, with fresh weights.

    Raises:
        RecipeError: there is no such architecture, or it does not take the recipe's arguments.
    """
    try:
        return build_network(recipe.network.architecture, network_arguments(recipe, n_classes))
    except (ValueError, TypeError) as error:
        raise RecipeError(f"network: {error}") from error


def trainable(network: nn.Module, objective: Objective) -> nn.Module:
    """Give a network what is trained with it and not served: temperatures that are learned, gates.

    Raises:
        RecipeError: its temperatures can't be learned from where they start.
    """
    if objective.learned_temperatures:
        boosting = boosting_of(network)
        try:
            network.boosting = Boosting(boosting.temperatures, boosting.stop_gradient, learned=True)
        except ValueError as error:
            raise RecipeError(f"objective.temperatures: {error}") from error
    if objective.gates:
        network.gates = Gates(network)
    return network


def served(network: nn.Module) -> nn.Module:
    """Take off again what is trained with a network and not served; its temperatures stay where they are."""
    network.boosting = boosting_of(network).fixed()
    gates = getattr(network, "gates", None)
    if isinstance(gates, Gates):
        gates.inputs.remove()
        del network.gates
    return network


def boosting_of(network: nn.Module) -> Boosting:
    """How a network of `models.registry` sums up its heads."""
    boosting = network.boosting
    assert isinstance(boosting, Boosting)
    return boosting


def temperatures_at(objective: Objective, n_exits: int, share: float) -> tuple[float, ...] | None:
    """The temperatures when this share of a run is done, 0 to 1; None where no schedule moves them."""
    if objective.final_temperatures is None:
        return None
    ends = (temperatures_per_exit(t, n_exits) for t in (objective.temperatures, objective.final_temperatures))
    return tuple(first + (last - first) * share for first, last in zip(*ends, strict=True))


def check_image_size(network: nn.Module, image_size_px: int) -> None:
    """Let a network see one empty image.

    Raises:
        RecipeError: it does not take images of that size.
    """
    network = copy.deepcopy(network).to("meta").eval()  # where shapes are all that is worked out
    try:
        _see(network, image_size_px)
    except RuntimeError as error:
        taken = ", ".join(str(size_px) for size_px in SIZES_PX if _takes(network, size_px))
        raise RecipeError(
            f"network: it does not take images of {image_size_px} x {image_size_px} px, but {taken or 'others'} "
            "(--image-size); or choose another network: --recipe image-folder is for photographs"
        ) from error


def freeze_unread(network: nn.Module, image_size_px: int) -> None:
    """Let weights that no exit reads, as some small networks have, want no gradient: processes would wait for it."""
    copied = copy.deepcopy(network).to("meta").train()
    torch.stack(
        [x.sum() for x in copied(torch.zeros(2, 3, image_size_px, image_size_px, device="meta"))]
    ).sum().backward()
    for (name, weight), other in zip(network.named_parameters(), copied.parameters(), strict=True):
        weight.requires_grad_(other.grad is not None or name.startswith("gates."))


@torch.no_grad()
def _see(network: nn.Module, image_size_px: int) -> None:
    network(torch.zeros(1, 3, image_size_px, image_size_px, device="meta"))


def _takes(network: nn.Module, image_size_px: int) -> bool:
    try:
        _see(network, image_size_px)
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class ExitLosses:
    """One forward pass, one loss per exit with weight 1 each, one summed loss (BoostNet, section 3).

    Args:
        distillation: weight of a further term per earlier exit: the divergence of its softened answer from the last
            exit's (Hinton et al. 2015), through which no gradient reaches the last exit.
        distillation_temperature: what softens both.
        gates_weight: of the loss of the network's gates, with `gates`.
    """

    label_smoothing: float = 0.0
    distillation: float = 0.0
    distillation_temperature: float = 2.0
    gates_weight: float = 0.0
    gates: Gates | None = None

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed loss, and statistics [2, exits] without gradient, both float32.

        Labels are class numbers [rows], or shares of the classes [rows, classes].

        The statistics are each exit's mean cross-entropy, and its share of valid samples: those it still can learn
        from, with a loss above the 10th percentile of exit 1's in the batch (BoostNet, Fig. 3).
        """
        # In float32 whatever the autocast type: a bf16 softmax holds about three digits.
        logits = [x.float() for x in network(images)]
        smoothing = self.label_smoothing
        losses = torch.stack(
            [functional.cross_entropy(x, labels, reduction="none", label_smoothing=smoothing) for x in logits]
        )
        per_exit = losses.mean(1)
        total = per_exit.sum()
        if self.distillation and len(logits) > 1:
            total = total + self.distillation * self._divergence(logits)
        if self.gates is not None:
            total = total + self.gates_weight * self.gates.loss(logits, labels)
        with torch.no_grad():
            valid = losses > losses[0].quantile(0.1)
            statistics = torch.stack([per_exit.detach(), valid.float().mean(1)])
        return total, statistics

    def _divergence(self, logits: list[Tensor]) -> Tensor:
        t = self.distillation_temperature
        teacher = functional.log_softmax(logits[-1].detach() / t, 1)
        students = torch.stack([functional.log_softmax(x / t, 1) for x in logits[:-1]])
        # Times t squared, so that its gradients keep their size whatever the temperature.
        return t * t * (teacher.exp() * (teacher - students)).sum(2).mean(1).sum()


def build_objective(objective: Objective, network: nn.Module | None = None) -> ExitLosses:
    """The loss of an objective; `network` is the `trainable` one, which its gates are part of."""
    gates = getattr(network, "gates", None)
    return ExitLosses(
        objective.label_smoothing, objective.distillation, objective.distillation_temperature, objective.gates, gates
    )
