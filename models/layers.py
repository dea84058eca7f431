"""Building blocks shared by MSDNet and RANet: convolutions, the first map, the head, weight initialisation."""

import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

StemKind = Literal["cifar", "imagenet"]
Initialisation = Literal["torch", "he"]


def check_choice(name: str, value: object, choices: Any) -> None:
    """Check that `value` is one of the choices of a Literal type, so that misspelt ones are not ignored.

    Raises:
        ValueError: it is not.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, and not {value!r}")


def check_fields(config: object) -> None:
    """Check every field of a configuration (a dataclass) by its type: positive integers, shares, booleans or choices.

    Raises:
        ValueError: a field is invalid; the message names it.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            check_choice(name, value, kind)
        elif kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, and not {value!r}")
        elif kind is float:
            if not isinstance(value, (int, float)) or not 0 < value <= 1:  # all floats are shares
                raise ValueError(f"{name} must be above 0 and at most 1, and not {value!r}")
        else:  # an int, or a tuple of them
            numbers, what = (value, "a list of whole numbers") if get_origin(kind) else ((value,), "a whole number")
            if not isinstance(numbers, tuple) or any(type(number) is not int or number < 1 for number in numbers):
                raise ValueError(f"{name} must be {what} of at least 1, and not {value!r}")


def hold_tuples(config: object) -> None:
    """Convert the lists of a frozen configuration to tuples: JSON and TOML give lists."""
    for name, value in vars(config).items():
        if isinstance(value, list):
            object.__setattr__(config, name, tuple(value))


def conv_bn_relu(n_in: int, n_out: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=bias), nn.BatchNorm2d(n_out), nn.ReLU(True)
    )


def branch(n_in: int, n_out: int, bottleneck_factor: int | None, stride: int) -> nn.Sequential:
    """A 3x3 convolution after a 1x1 bottleneck, if `bottleneck_factor` is not None; in post-activation order."""
    if bottleneck_factor is None:
        return conv_bn_relu(n_in, n_out, 3, stride)
    width = min(n_in, bottleneck_factor * n_out)
    return nn.Sequential(*conv_bn_relu(n_in, width, 1), *conv_bn_relu(width, n_out, 3, stride))


def first_map(kind: StemKind, n_out: int) -> nn.Sequential:
    """Layers from images [rows, 3, size, size] to a map of the same size (`cifar`) or a quarter of it (`imagenet`)."""
    if kind == "cifar":
        return conv_bn_relu(3, n_out, 3)
    return nn.Sequential(*conv_bn_relu(3, n_out, 7, 2, bias=True), nn.MaxPool2d(3, 2, 1))


class Head(nn.Module):
    """Two strided convolutions, pooling and a linear layer on a map of 8 x 8 or 7 x 7 pixels."""

    def __init__(self, n_in: int, kind: StemKind, n_classes: int) -> None:
        super().__init__()
        width = 128 if kind == "cifar" else n_in
        self.features = nn.Sequential(
            *conv_bn_relu(n_in, width, 3, 2), *conv_bn_relu(width, width, 3, 2), nn.AvgPool2d(2)
        )
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, coarsest: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(coarsest).flatten(1))
        return logits


def initialise(part: nn.Module, initialisation: Initialisation) -> None:
    """Draw the initial weights of every layer within `part`.

    Args:
        initialisation: `torch` leaves torch's defaults; `he` draws a k x k convolution with n outputs from
            N(0, 2 / (k k n)) and sets the biases of linear layers to 0.

    Raises:
        ValueError: `initialisation` is neither.
    """
    check_choice("initialisation", initialisation, Initialisation)
    if initialisation == "torch":
        return
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / (math.prod(module.kernel_size) * module.out_channels)))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
