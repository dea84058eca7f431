"""MSDNet, the multi-scale dense network with an exit after every block (Huang et al., ICLR 2018).

An ordinary module, independent of serving: `forward(images)` returns the list of its N ensembled logits.
`models.staging` cuts it into stages.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from models.boosting import Boosting, Rescaling, rescale_gradient, temperatures_per_exit
from models.layers import (
    Head,
    Initialisation,
    StemKind,
    branch,
    check_choice,
    check_fields,
    conv_bn_relu,
    first_map,
    hold_tuples,
    initialise,
)


@dataclass(frozen=True)
class MSDNetConfig:
    """Hyper-parameters of an MSDNet, named as in the literature; the defaults are those of CIFAR anytime prediction."""

    n_classes: int = 100
    image_size_px: int = 32
    stem: StemKind = "cifar"
    n_blocks: int = 10  # one exit per block
    base: int = 4  # layers of the first block
    step: int = 2  # layers of each later block
    step_mode: Literal["even", "lin_grow"] = "even"
    n_channels: int = 16  # channel units after the stem
    growth_rate: int = 6  # channel units that a layer adds
    growth_factors: tuple[int, ...] = (1, 2, 4)  # channels per unit at each scale, finest first
    bottleneck_factors: tuple[int, ...] = (1, 2, 4)
    bottleneck: bool = True
    prune: Literal["max", "min"] = "max"  # how scales are dropped with depth
    reduction: float = 0.5  # factor on the channel units at a transition

    def __post_init__(self) -> None:
        hold_tuples(self)
        check_fields(self)
        if len(self.growth_factors) != len(self.bottleneck_factors):
            raise ValueError("growth_factors and bottleneck_factors must have one entry per scale each")
        if any(self.growth_rate * factor % 2 for factor in self.growth_factors[1:]):
            raise ValueError("growth_rate times each growth factor but the first must be even: two maps give half each")
        if any(plan.units_reduced == 0 for plan in layer_plans(self)):
            raise ValueError("reduction must leave at least one channel: raise it, n_channels or growth_rate")

    @property
    def n_scales(self) -> int:
        return len(self.growth_factors)

    @property
    def layers_per_block(self) -> list[int]:
        later = (self.step if self.step_mode == "even" else self.step * i + 1 for i in range(1, self.n_blocks))
        return [self.base, *later]


@dataclass(frozen=True)
class LayerPlan:
    """The shape of an MSD layer: scales in and out, and channel units before it, after it, and after its transition."""

    n_scales_in: int
    n_scales_out: int
    units_in: int
    units_out: int
    units_reduced: int | None  # None if no transition follows


def layer_plans(config: MSDNetConfig) -> Iterator[LayerPlan]:
    """Yield the plan of every layer in order (layers are numbered from 1 over the whole network)."""
    depth, n_scales = sum(config.layers_per_block), config.n_scales
    interval = math.ceil(depth / n_scales)
    units = config.n_channels
    for layer in range(1, depth + 1):
        if config.prune == "max":
            scales_in = n_scales - max(0, layer - 2) // interval
            scales_out = n_scales - (layer - 1) // interval
            transition = scales_in > scales_out
        else:
            scales_in = min(n_scales, depth - layer + 2)
            scales_out = min(n_scales, depth - layer + 1)
            transition = layer in (depth // 3, 2 * depth // 3)
        grown = units + config.growth_rate
        reduced = math.floor(config.reduction * grown) if transition else None
        yield LayerPlan(scales_in, scales_out, units, grown, reduced)
        units = grown if reduced is None else reduced


class Stem(nn.Module):
    """The first map at every scale, finest first."""

    def __init__(self, config: MSDNetConfig) -> None:
        super().__init__()
        widths = [config.n_channels * factor for factor in config.growth_factors]
        coarser = (conv_bn_relu(a, b, 3, 2) for a, b in pairwise(widths))
        self.scales = nn.ModuleList([first_map(config.stem, widths[0]), *coarser])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for scale in self.scales:
            images = scale(images)
            maps.append(images)
        return maps


class MSDLayer(nn.Module):
    """Add channels to every remaining scale, from its own map and from the next finer one, if there is one."""

    def __init__(self, config: MSDNetConfig, plan: LayerPlan) -> None:
        super().__init__()
        self.n_dropped = plan.n_scales_in - plan.n_scales_out
        self.same, self.down = nn.ModuleList(), nn.ModuleList()
        first_scale = config.n_scales - plan.n_scales_out
        self.has_finest = first_scale == config.n_scales - plan.n_scales_in
        for scale in range(first_scale, config.n_scales):
            width = config.growth_rate * config.growth_factors[scale]
            n_in = plan.units_in * config.growth_factors[scale]
            factor = config.bottleneck_factors[scale] if config.bottleneck else None
            if scale == first_scale and self.has_finest:
                self.same.append(branch(n_in, width, factor, 1))
                continue
            finer_in = plan.units_in * config.growth_factors[scale - 1]
            finer_factor = config.bottleneck_factors[scale - 1] if config.bottleneck else None
            self.down.append(branch(finer_in, width // 2, finer_factor, 2))
            self.same.append(branch(n_in, width // 2, factor, 1))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        grown = []
        kept = maps[self.n_dropped :]
        if self.has_finest:
            grown.append(torch.cat([kept[0], self.same[0](kept[0])], 1))
        first = len(grown)
        finer_maps = maps[self.n_dropped + first - 1 :]
        for down, same, finer, x in zip(self.down, self.same[first:], finer_maps, kept[first:], strict=False):
            grown.append(torch.cat([x, down(finer), same(x)], 1))
        return grown


class Transition(nn.Module):
    """A 1x1 convolution at every scale, which reduces the channel units."""

    def __init__(self, factors: Sequence[int], units_in: int, units_out: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(conv_bn_relu(units_in * f, units_out * f, 1) for f in factors)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class MSDNet(nn.Module):
    """A boosted MSDNet.

    Args:
        config: the architecture; `CONFIGS` holds the published ones.
        temperatures: of the boosted ensemble (see `temperatures_per_exit`); 0 gives plain MSDNet.
        gradient_rescaling: `coarsest` scales the gradient on the coarsest map as the released code does, so that loss
            j reaches block i with weight 1/(N-i) (BoostNet Eq. 7); `all` does so on every scale; `off` on none.
        stop_gradient, head_scales: see `Boosting`.
        initialisation: see `initialise`. Every published PyTorch MSDNet has `torch`: their code contains the intended
            `he`, but never applies it.
    """

    def __init__(
        self,
        config: MSDNetConfig,
        temperatures: float | Sequence[float] = 0.5,
        gradient_rescaling: Rescaling = "coarsest",
        stop_gradient: bool = True,
        initialisation: Initialisation = "torch",
        head_scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_choice("gradient_rescaling", gradient_rescaling, Rescaling)
        self.config = config
        self.gradient_rescaling = gradient_rescaling
        self.stem = Stem(config)
        self.blocks, self.heads = nn.ModuleList(), nn.ModuleList()
        plans = layer_plans(config)
        units = config.n_channels
        for n_layers in config.layers_per_block:
            layers: list[nn.Module] = []
            for _ in range(n_layers):
                plan = next(plans)
                layers.append(MSDLayer(config, plan))
                units = plan.units_out
                if plan.units_reduced is not None:
                    factors = config.growth_factors[-plan.n_scales_out :]
                    layers.append(Transition(factors, plan.units_out, plan.units_reduced))
                    units = plan.units_reduced
            self.blocks.append(nn.Sequential(*layers))
            self.heads.append(Head(units * config.growth_factors[-1], config.stem, config.n_classes))
        initialise(self, initialisation)
        self.boosting = Boosting(temperatures_per_exit(temperatures, config.n_blocks), stop_gradient, head_scales)

    @property
    def n_exits(self) -> int:
        return len(self.heads)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images [rows, 3, size, size] to N ensembled logits [rows, classes]."""
        maps = self.stem(images)
        head_logits = []
        for i, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            maps = self._rescale(block(maps), 1.0 / (self.n_exits - i))
            head_logits.append(head(maps[-1]))
            maps = self._rescale(maps, self.n_exits - i - 1.0)
        ensembled: list[Tensor] = self.boosting(head_logits)
        return ensembled

    def _rescale(self, maps: list[Tensor], factor: float) -> list[Tensor]:
        if not self.training or self.gradient_rescaling == "off":
            return maps
        n_untouched = len(maps) - 1 if self.gradient_rescaling == "coarsest" else 0
        return [*maps[:n_untouched], *(rescale_gradient(x, factor) for x in maps[n_untouched:])]


def _imagenet(step: int) -> MSDNetConfig:
    return MSDNetConfig(
        n_classes=1000,
        image_size_px=224,
        stem="imagenet",
        n_blocks=5,
        base=step,
        step=step,
        n_channels=32,
        growth_rate=16,
        growth_factors=(1, 2, 4, 4),
        bottleneck_factors=(1, 2, 4, 4),
    )


CONFIGS: dict[str, MSDNetConfig] = {
    "C-any": MSDNetConfig(),
    "C-batch-4": MSDNetConfig(n_blocks=6, base=4),
    "C-batch-8": MSDNetConfig(n_blocks=6, base=8),
    "C-batch-12": MSDNetConfig(n_blocks=6, base=12),
    "C-lin-5": MSDNetConfig(n_blocks=5, base=1, step=1, step_mode="lin_grow"),
    "C-lin-7": MSDNetConfig(n_blocks=7, base=1, step=1, step_mode="lin_grow"),
    **{f"I-{step}": _imagenet(step) for step in (4, 5, 6, 7)},
}
