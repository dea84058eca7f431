"""The network that an objective trains: building it, adding what only training needs, and removing that again."""

import copy
from typing import Any

import torch
from torch import nn

from models.boosting import Boosting, temperatures_per_exit
from models.registry import build_network
from training.gates import Gates
from training.recipe import Objective, Recipe, RecipeError

SIZES_PX = range(32, 513, 32)  # tried for the error message, when a network does not take the size it is given


def network_arguments(recipe: Recipe, n_classes: int) -> dict[str, Any]:
    """Arguments for `models.registry.build_network`: the recipe's own, and those that its objective sets."""
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
    """Add to a network what its objective trains but does not serve: learned temperatures, gates.

    Raises:
        RecipeError: the initial temperatures can't be learned, or the final ones don't fit the exits; or gates are
            asked for, but the network has only one exit.
    """
    try:
        temperatures_at(objective, len(boosting_of(network).temperatures), 1.0)
    except ValueError as error:
        raise RecipeError(f"objective.final_temperatures: {error}") from error
    if objective.learned_temperatures:
        boosting = boosting_of(network)
        try:
            network.boosting = Boosting(boosting.temperatures, boosting.stop_gradient, learned=True)
        except ValueError as error:
            raise RecipeError(f"objective.temperatures: {error}") from error
    if objective.gates:
        if len(boosting_of(network).temperatures) == 1:
            raise RecipeError("objective.gates: the network has one exit, so no later one to go on to; set gates = 0")
        network.gates = Gates(network)
    return network


def served(network: nn.Module) -> nn.Module:
    """Remove what `trainable` added; learned temperatures are fixed at their present values."""
    network.boosting = boosting_of(network).fixed()
    gates = getattr(network, "gates", None)
    if isinstance(gates, Gates):
        gates.inputs.remove()
        del network.gates
    return network


def boosting_of(network: nn.Module) -> Boosting:
    """The module that sums the heads of a network of `models.registry`."""
    boosting = network.boosting
    assert isinstance(boosting, Boosting)
    return boosting


def temperatures_at(objective: Objective, n_exits: int, share: float) -> tuple[float, ...] | None:
    """The temperatures when this share (0 to 1) of a run is done; None if the objective has no final temperatures."""
    if objective.final_temperatures is None:
        return None
    ends = (temperatures_per_exit(t, n_exits) for t in (objective.temperatures, objective.final_temperatures))
    return tuple(first + (last - first) * share for first, last in zip(*ends, strict=True))


def check_image_size(network: nn.Module, image_size_px: int) -> None:
    """Check that a network on the CPU takes images of this size, by running it on a blank one.

    Raises:
        RecipeError: it does not; the message lists sizes that it takes.
    """
    was_training = network.training
    network.eval()
    try:
        _see(network, image_size_px)
    except RuntimeError as error:
        taken = ", ".join(str(size_px) for size_px in SIZES_PX if _takes(network, size_px))
        is_for_small = network.config.stem == "cifar"  # type: ignore[union-attr]
        other = "image-folder is for photographs" if is_for_small else "cifar100-fast is for images of 32 px"
        raise RecipeError(
            f"network: takes no images of {image_size_px} x {image_size_px} px, but {taken or 'other sizes'} "
            f"(--image-size); or choose another network: --recipe {other}"
        ) from error
    network.train(was_training)


def freeze_unread(network: nn.Module, image_size_px: int) -> None:
    """Turn off gradients of weights that no exit reads, as some small networks have: DDP would wait for them."""
    copied = copy.deepcopy(network).cpu().train()
    with torch.random.fork_rng(devices=[]):  # this pass must not change what training draws
        torch.stack([x.sum() for x in copied(torch.zeros(2, 3, image_size_px, image_size_px))]).sum().backward()
    for (name, weight), other in zip(network.named_parameters(), copied.parameters(), strict=True):
        weight.requires_grad_(other.grad is not None or name.startswith("gates."))


@torch.no_grad()
def _see(network: nn.Module, image_size_px: int) -> None:
    network(torch.zeros(1, 3, image_size_px, image_size_px))


def _takes(network: nn.Module, image_size_px: int) -> bool:
    try:
        _see(network, image_size_px)
    except RuntimeError:
        return False
    return True
