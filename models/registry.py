"""Builds networks by name from plain JSON arguments, which a bundle's manifest stores to rebuild its network."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from models import msdnet, ranet

# Arguments of the network; all others are fields of its configuration.
_OPTIONS = ("temperatures", "gradient_rescaling", "stop_gradient", "initialisation", "head_scales")


def _configured(network: Callable[..., nn.Module], configs: Mapping[str, Any]) -> Callable[..., nn.Module]:
    def build(config: str | None = None, **arguments: Any) -> nn.Module:
        if config is None:
            raise ValueError(f"config is missing, the name of a configuration; known: {', '.join(configs)}")
        if config not in configs:
            raise ValueError(f"no configuration {config!r}; known: {', '.join(configs)}")
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        known = [field.name for field in fields(configs[config])]
        if unknown := [name for name in arguments if name not in known]:
            raise ValueError(f"no argument {unknown[0]!r}; known: config, {', '.join([*known, *_OPTIONS])}")
        return network(replace(configs[config], **arguments), **options)

    return build


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "msdnet": _configured(msdnet.MSDNet, msdnet.CONFIGS),
    "ranet": _configured(ranet.RANet, ranet.CONFIGS),
}


def build_network(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        architecture: a name in `ARCHITECTURES`.
        arguments: plain JSON: `config` (a name in the `CONFIGS` of `models.msdnet` or `models.ranet`), `temperatures`,
            `gradient_rescaling`, `stop_gradient`, `initialisation`, `head_scales`, and any field of the architecture's
            configuration to override, such as `n_classes`.

    Raises:
        ValueError: the architecture or configuration is unknown, or an argument is invalid.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"no architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    try:
        return ARCHITECTURES[architecture](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"arguments of architecture {architecture!r}: {error}") from error
