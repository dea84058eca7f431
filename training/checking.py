"""Sees whether a module of anybody's is what can be packed: before it is trained, which takes long."""

from typing import Any

import torch
from torch import Tensor, nn

from models.normalise import Normalise
from models.staging import split
from training.errors import TrainingError
from training.image_set import ImageSet


class NetworkError(TrainingError):
    """A network that can't be packed; the message says what came, and what is wanted."""


def check_network(network: nn.Module, images: ImageSet) -> None:
    """See that a network answers two blank images with a list of logits [2, classes], and can be cut into stages.

    Raises:
        NetworkError: it answers otherwise, or not at all.
        StagingError: it can't be cut.
    """
    height_px, width_px = images.train_images.shape[1:3]
    n_classes = len(images.class_names)
    network.eval()
    try:
        with torch.no_grad():
            answer: Any = network(torch.zeros(2, 3, height_px, width_px))
    except Exception as error:  # whatever a module of somebody's trips over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NetworkError(
            f"the network fails on images [2, 3, {height_px}, {width_px}] ({reason}); is it made for another size "
            "(--image-size)?"
        ) from error
    exits = answer if isinstance(answer, (list, tuple)) else []
    if not exits or any(not isinstance(x, Tensor) or x.shape != (2, n_classes) for x in exits):
        parts = answer if exits else [answer]
        came = [f"a tensor {[*x.shape]}" if isinstance(x, Tensor) else f"a {type(x).__name__}" for x in parts]
        raise NetworkError(
            f"two images are answered with {'a list of ' if exits else ''}{', '.join(came)}; what is wanted is a list "
            f"with a tensor of logits [2, {n_classes}] for each exit, as there are {n_classes} classes"
        )
    split(
        network,
        torch.randint(0, 256, (2, height_px, width_px, 3), dtype=torch.uint8),
        Normalise(images.mean, images.std),
    )
