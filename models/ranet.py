"""RANet, the resolution-adaptive network: sub-networks on ever finer maps, two exits each (Yang et al., CVPR 2020).

Easy images are answered from small maps. The features of a sub-network are fused, block by block, into the next one,
which works at a higher resolution and ends at the lowest, where all exits read.

An ordinary module, like `models.msdnet`: `forward(images)` returns the list of its N ensembled logits.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

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
class RANetConfig:
    """Hyper-parameters of a RANet, lowest resolution first; the defaults are those of CIFAR anytime prediction."""

    n_classes: int = 100
    image_size_px: int = 32
    stem: StemKind = "cifar"
    scales: tuple[int, ...] = (1, 2, 3, 3)  # of each sub-network's first map; 1: the smallest, each next twice it
    growth_factors: tuple[int, ...] = (4, 2, 1, 1)  # channels per unit in each sub-network
    bottleneck_factors: tuple[int, ...] = (4, 2, 1, 1)
    n_channels: int = 16  # channel units after the stem
    growth_rate: int = 6  # channel units that a layer adds
    n_blocks: int = 2  # of the first sub-network; also the number of exits of each sub-network
    block_step: int = 2  # additional blocks of each further sub-network, all of them fusing
    step: int = 4  # layers per block
    step_mode: Literal["even", "lin_grow"] = "even"  # lin_grow: block j has j times `step`
    compression: float = 0.25  # share of a fusing layer's or block's channels from the previous sub-network
    reduction: float = 0.5  # factor on the channels at a transition

    def __post_init__(self) -> None:
        hold_tuples(self)
        check_fields(self)
        if not len(self.scales) == len(self.growth_factors) == len(self.bottleneck_factors):
            raise ValueError("scales, growth_factors and bottleneck_factors must have one entry per sub-network each")
        if self.scales[:1] != (1,) or any(b - a not in (0, 1) for a, b in pairwise(self.scales)):
            raise ValueError("scales must start at 1 and rise by 0 or 1 from each sub-network to the next")
        if self.block_step > self.n_blocks:
            raise ValueError("block_step must be no more than n_blocks")
        if any(math.floor(self.compression * self.growth_rate * f) < 1 for f in self.growth_factors[1:]):
            raise ValueError("compression must leave at least one channel of every layer's growth: raise growth_rate")

    @property
    def n_exits(self) -> int:
        return len(self.scales) * self.n_blocks


@dataclass(frozen=True)
class BlockPlan:
    """The shape of one block.

    Attributes:
        exit: the first exit (0-based) that needs it.
        widths: channels of its input and after each of its layers.
        scale_in, scale_out: scales of its input and its last layer; they differ if the block downsamples.
        low: the block of the previous sub-network that it fuses; None for a normal block, which an exit follows.
        compressed: channels that it takes from the last map of `low`.
        reduced: channels after its transition; None if no transition follows.
    """

    exit: int
    widths: tuple[int, ...]
    scale_in: int
    scale_out: int
    low: "BlockPlan | None"
    compressed: int
    reduced: int | None

    @property
    def width_out(self) -> int:
        return self.widths[-1] + self.compressed if self.reduced is None else self.reduced

    def scale_of(self, feature: int) -> int:
        """The scale of a feature: 0 is the input, k the map after layer k."""
        return self.scale_out if feature == len(self.widths) - 1 else self.scale_in


def block_plans(config: RANetConfig) -> list[list[BlockPlan]]:
    """Plan the blocks of every sub-network."""
    plans: list[list[BlockPlan]] = []
    for index, (scale, factor) in enumerate(zip(config.scales, config.growth_factors, strict=True)):
        n_fusing, width = index * config.block_step, config.n_channels * factor
        n_blocks, n_down = config.n_blocks + n_fusing, scale - 1
        down = range(n_fusing, n_fusing - n_down * config.block_step, -config.block_step)
        transitions = {m * n_blocks // scale for m in range(1, scale)}
        blocks: list[BlockPlan] = []
        for number in range(1, n_blocks + 1):
            n_layers = config.step if config.step_mode == "even" else config.step * number
            widths = tuple(width + config.growth_rate * factor * i for i in range(n_layers + 1))
            low = plans[-1][number - 1] if number <= n_fusing else None
            compressed = 0 if low is None else math.floor(config.compression * widths[-1])
            reduced = math.floor(config.reduction * (widths[-1] + compressed)) if number in transitions else None
            exit_index = index * config.n_blocks + max(0, number - n_fusing - 1)
            scale_out = scale - (number in down)
            blocks.append(BlockPlan(exit_index, widths, scale, scale_out, low, compressed, reduced))
            width, scale = blocks[-1].width_out, scale_out
        plans.append(blocks)
    return plans


class Stem(nn.Module):
    """The first map of every sub-network, lowest resolution first; each is computed from the next higher one."""

    def __init__(self, config: RANetConfig) -> None:
        super().__init__()
        widths = [config.n_channels * factor for factor in config.growth_factors]
        finer = pairwise(zip(reversed(widths), reversed(config.scales), strict=True))
        lower = (conv_bn_relu(n_in, n_out, 3, 1 if a == b else 2) for (n_in, a), (n_out, b) in finer)
        self.maps = nn.ModuleList([first_map(config.stem, widths[-1]), *lower])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for layer in self.maps:
            images = layer(images)
            maps.insert(0, images)
        return maps


def resized(x: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


class Block(nn.Module):
    """Dense layers; in a fusing block, each also reads the previous sub-network's map at the same position."""

    def __init__(self, config: RANetConfig, index: int, plan: BlockPlan) -> None:
        super().__init__()
        self.plan, low = plan, plan.low
        growth = config.growth_rate * config.growth_factors[index]
        from_low = 0 if low is None else math.floor(config.compression * growth)
        self.own, self.low = nn.ModuleList(), nn.ModuleList()
        for feature, n_in in enumerate(plan.widths[:-1]):
            stride = 1 if plan.scale_of(feature) == plan.scale_of(feature + 1) else 2
            self.own.append(branch(n_in, growth - from_low, config.bottleneck_factors[index], stride))
            if low is not None:
                self.low.append(branch(low.widths[feature], from_low, config.bottleneck_factors[index - 1], 1))
        self.compress = None if low is None else conv_bn_relu(low.widths[-1], plan.compressed, 1)
        n_before = plan.widths[-1] + plan.compressed
        self.transition = None if plan.reduced is None else conv_bn_relu(n_before, plan.reduced, 1)

    def forward(self, x: Tensor, low_features: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the next block's input, and the features that the next sub-network fuses: input and layers."""
        plan, low = self.plan, self.plan.low
        features = [x]
        for number, own in enumerate(self.own):
            y, scale = own(x), plan.scale_of(number + 1)
            parts = [resized(x, y) if plan.scale_of(number) != scale else x, y]
            if low is not None:
                u = self.low[number](low_features[number])
                parts.insert(1, resized(u, y) if low.scale_of(number) != scale else u)
            x = torch.cat(parts, 1)
            features.append(x)
        if low is not None and self.compress is not None:
            u = self.compress(low_features[-1])
            x = torch.cat([x, resized(u, x) if low.scale_out != plan.scale_out else u], 1)
        if self.transition is not None:
            x = self.transition(x)
        return x, features if self.training else self._kept(features)

    def _kept(self, features: list[Tensor]) -> list[Tensor]:
        """Return features as slices of the last, whose first channels they are: a waiting image keeps a single map."""
        last = len(features) - 1
        whole = [last if self.plan.scale_of(i) == self.plan.scale_out else last - 1 for i in range(last + 1)]
        return [features[j] if i == j else features[j][:, : self.plan.widths[i]] for i, j in enumerate(whole)]


class RANet(nn.Module):
    """A boosted RANet.

    Args:
        config: the architecture; `CONFIGS` holds the published ones.
        temperatures: of the boosted ensemble (see `temperatures_per_exit`); 0 gives plain RANet.
        gradient_rescaling: `off`, as in the released code; `coarsest` scales the gradient of the maps that heads read,
            as in MSDNet; `all` that of every map which passes from one exit's blocks to another's, so that loss j
            reaches block i with weight 1/(N-i) on every path (BoostNet Eq. 7).
        stop_gradient, head_scales: see `Boosting`.
        initialisation: of blocks and heads, see `initialise`; `he`, as in the released code. The stem keeps torch's.
    """

    def __init__(
        self,
        config: RANetConfig,
        temperatures: float | Sequence[float] = 0.5,
        gradient_rescaling: Rescaling = "off",
        stop_gradient: bool = True,
        initialisation: Initialisation = "he",
        head_scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_choice("gradient_rescaling", gradient_rescaling, Rescaling)
        self.config = config
        self.gradient_rescaling = gradient_rescaling
        self.stem = Stem(config)
        self.subnetworks, self.heads = nn.ModuleList(), nn.ModuleList()
        for index, plans in enumerate(block_plans(config)):
            self.subnetworks.append(nn.ModuleList(Block(config, index, plan) for plan in plans))
            widths = (plan.width_out for plan in plans if plan.low is None)
            self.heads.extend(Head(n_in, config.stem, config.n_classes) for n_in in widths)
        initialise(self.subnetworks, initialisation)
        initialise(self.heads, initialisation)
        self.boosting = Boosting(temperatures_per_exit(temperatures, config.n_exits), stop_gradient, head_scales)

    @property
    def n_exits(self) -> int:
        return len(self.heads)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images [rows, 3, size, size] to N ensembled logits [rows, classes]."""
        head_logits: list[Tensor] = []
        low_features: list[list[Tensor]] = []
        every_map = self.gradient_rescaling == "all"
        for x, blocks in zip(self.stem(images), self.subnetworks, strict=True):
            first_exit = len(head_logits)
            if every_map:
                x = self._passed(x, 0, first_exit)
            features: list[list[Tensor]] = []
            for number, block in enumerate(cast(Iterable[Block], blocks)):
                low: list[Tensor] = []
                if (plan := block.plan.low) is not None:
                    low = low_features[number]
                    if every_map:
                        low = [self._passed(u, plan.exit, first_exit) for u in low]
                x, made = block(x, low)
                features.append(made)
                if plan is None:
                    i = len(head_logits)
                    head_logits.append(self.heads[i](self._rescale(x, 1.0 / (self.n_exits - i))))
                    x = self._passed(x, i, i + 1)
            low_features = features
        ensembled: list[Tensor] = self.boosting(head_logits)
        return ensembled

    def _passed(self, x: Tensor, made: int, read: int) -> Tensor:
        """Rescale a map of exit `made` for the blocks of exit `read`, whose gradients then have weight 1/(N - read)."""
        return self._rescale(x, (self.n_exits - read) / (self.n_exits - made)) if made != read else x

    def _rescale(self, x: Tensor, factor: float) -> Tensor:
        if not self.training or self.gradient_rescaling == "off":
            return x
        return rescale_gradient(x, factor)


def _imagenet(n_channels: int) -> RANetConfig:
    return RANetConfig(
        n_classes=1000,
        image_size_px=224,
        stem="imagenet",
        scales=(1, 2, 3, 4),
        growth_factors=(4, 2, 2, 1),
        bottleneck_factors=(4, 2, 2, 1),
        n_channels=n_channels,
        growth_rate=16,
        step=8,
    )


def _batch(scales: tuple[int, ...], factors: tuple[int, ...]) -> RANetConfig:
    return RANetConfig(scales=scales, growth_factors=factors, bottleneck_factors=factors, step=2, step_mode="lin_grow")


CONFIGS: dict[str, RANetConfig] = {
    "C-any": RANetConfig(),
    "C-m1": _batch((1, 2, 3), (4, 2, 1)),
    "C-m2": _batch((1, 2, 2, 3), (4, 2, 2, 1)),
    "C-m3": _batch((1, 2, 3, 3), (4, 2, 1, 1)),
    **{f"I-{n_channels}": _imagenet(n_channels) for n_channels in (64, 32)},
}
