"""Checks, before the long training, that a user's own module can be packed into a bundle."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models.cost import measure_cost
from models.normalise import Normalise
from models.staging import split
from training.errors import TrainingError
from training.image_set import ImageSet

LEAST_SAVED = 0.01  # by leaving at exit 1, of the full cost; the server's control of the budget needs room, too


class NetworkError(TrainingError):
    """A network that can't be packed; the message says what it returned and what it must return."""


def check_network(network: nn.Module, images: ImageSet) -> None:
    """Check that a network returns a list of logits [2, classes] for two blank images, and can be cut into stages.

    Every exit must cost more than the one before it, and the last at least `LEAST_SAVED` more than the first: otherwise
    leaving early saves nothing.

    Raises:
        NetworkError: it fails, returns anything else, or has an exit that costs no more than the one before it.
        StagingError: it can't be cut.
    """
    height_px, width_px = images.train_images.shape[1:3]
    n_classes = len(images.class_names)
    network.eval()
    try:
        with torch.no_grad():
            answer: Any = network(torch.zeros(2, 3, height_px, width_px))
    except Exception as error:  # a user's module may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NetworkError(
            f"the network fails on images [2, 3, {height_px}, {width_px}] ({reason}); if it is made for another size, "
            "set --image-size"
        ) from error
    exits = answer if isinstance(answer, (list, tuple)) else []
    if not exits or any(not isinstance(x, Tensor) or x.shape != (2, n_classes) for x in exits):
        parts = answer if exits else [answer]
        came = [f"a tensor {[*x.shape]}" if isinstance(x, Tensor) else f"a {type(x).__name__}" for x in parts]
        raise NetworkError(
            f"for two images the network returns {'a list of ' if exits else ''}{', '.join(came)}; it must return a "
            f"list with a tensor of logits [2, {n_classes}] for each exit, as there are {n_classes} classes"
        )
    if not all(logits.isfinite().all() for logits in exits):
        raise NetworkError("for two blank images the network returns logits that are not finite: check its weights")
    split(
        network,
        torch.randint(0, 256, (2, height_px, width_px, 3), dtype=torch.uint8),
        Normalise(images.mean, images.std),
    )
    costs = measure_cost(network, images.image_size_px).executed
    for number, (before, cost) in enumerate(pairwise((0, *costs)), start=1):
        if cost <= before:
            than = f"exit {number - 1}" if number > 1 else "nothing"
            raise NetworkError(
                f"exit {number} costs no more than {than} (counted: convolutions, linear layers and other matrix "
                "products, ReLU, pooling): let it run more of the network, or remove it"
            )
    if len(costs) > 1 and costs[0] > (1 - LEAST_SAVED) * costs[-1]:
        raise NetworkError(
            f"exit 1 costs {costs[0] / costs[-1]:.2%} of what the last exit costs, so leaving early saves nothing: "
            "return the cheapest exit first, and let it run less of the network"
        )
