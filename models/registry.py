"""Networks by name, from plain JSON arguments: what a bundle's manifest stores is what rebuilds its network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from models.msdnet import CONFIGS, MSDNet, Rescaling


def _msdnet(
    config: str,
    temperatures: float | Sequence[float] = 0.5,
    gradient_rescaling: Rescaling = "coarsest",
    stop_gradient: bool = True,
    **overrides: Any,
) -> nn.Module:
    if config not in CONFIGS:
        raise ValueError(f"no MSDNet configuration {config!r}; known: {', '.join(CONFIGS)}")
    return MSDNet(replace(CONFIGS[config], **overrides), temperatures, gradient_rescaling, stop_gradient)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"msdnet": _msdnet}


def build_network(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        architecture: a name in `ARCHITECTURES`.
        arguments: plain JSON. For `msdnet`: `config` (a name in `models.msdnet.CONFIGS`), `temperatures`,
            `gradient_rescaling`, `stop_gradient`, and any field of `MSDNetConfig` to override, such as `n_classes`.

    Raises:
        ValueError: unknown architecture or configuration, or arguments it does not take.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"no architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    try:
        return ARCHITECTURES[architecture](**arguments)
    except TypeError as error:
        raise ValueError(f"arguments of architecture {architecture!r}: {error}") from error
