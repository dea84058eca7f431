"""Pads the channels of maps to multiples of eight, and scales them so that their biases are exact.

Tensor cores need such multiples: other numbers of channels take up to four times as long. The added channels are zeros,
computed by weights of zero and read by weights of zero. Concatenation puts such channels between real ones, so the
positions of the real channels of every map are tracked, also from stage to stage.

Errors from rounding biases and weights to half precision shift every image's answer alike. So channels are multiplied
by factors near 1, at which their biases are exact and the errors of their weights cancel best (`rounding.py`). Layers
that read a channel divide their weights by its factor; they are rounded anyway. ReLU and pooling preserve factors.

Operations that this module does not know get only the real channels, at their original scale.
"""

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models.staging import Stage
from service.runners.torch_cuda.joined import ConvRelu
from service.runners.torch_cuda.replaced import N_CHANNELS, is_concat
from service.runners.torch_cuda.rounding import scales_for

BY_CHANNEL = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Identity, nn.Dropout, nn.Upsample)
BY_CHANNEL_FUNCTIONS = (torch.relu, F.relu, F.interpolate, F.max_pool2d, F.avg_pool2d)
BY_CHANNEL_METHODS = ("to", "float", "half", "contiguous")
SUMS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Layout:
    """Where the real channels of a map are, in their order. The others have finite values that nothing reads.

    Attributes:
        scales: the factors by which the real channels are multiplied.
    """

    positions: tuple[int, ...]
    width: int
    scales: tuple[float, ...]

    @property
    def is_plain(self) -> bool:
        return len(self.positions) == self.width and not self.is_scaled

    @property
    def is_scaled(self) -> bool:
        return any(scale != 1.0 for scale in self.scales)

    def taking(self, weight: Tensor, n_each: int = 1) -> Tensor:
        """Spread a weight [outputs, real channels x n_each, ...] over all channels of the map, dividing by scales."""
        chosen = [position * n_each + i for position in self.positions for i in range(n_each)]
        scales = weight.new_tensor(self.scales).repeat_interleave(n_each)
        wide = weight.new_zeros((len(weight), self.width * n_each, *weight.shape[2:]))
        wide[:, chosen] = weight / scales.view(1, -1, *[1] * (weight.ndim - 2))
        return wide


def plain(width: int) -> Layout:
    return Layout(tuple(range(width)), width, (1.0,) * width)


@torch.no_grad()
def widen(stages: Sequence[Stage], multiple: int, dtype: torch.dtype = torch.float32) -> None:
    """Widen the outputs of convolutions to `multiple` channels or a multiple of it, and adapt what reads them.

    Afterwards, a map's node has its number of channels in `meta[N_CHANNELS]`, if it is known.

    Args:
        dtype: what weights and biases will be rounded to; channels are scaled for it.
    """
    layouts: dict[str, Layout] = {}
    for stage in stages:
        _Widening(stage, multiple, dtype, layouts).run()


class _Widening:
    """Widens one stage. `of` has the layout of every map whose number of channels is known.

    Args:
        layouts: of the values of earlier stages, by name; those of this stage are added.
    """

    def __init__(self, stage: Stage, multiple: int, dtype: torch.dtype, layouts: dict[str, Layout]) -> None:
        self._stage, self._multiple, self._dtype, self._layouts = stage, multiple, dtype, layouts
        self.of: dict[fx.Node, Layout] = {}
        self._flat: dict[fx.Node, Layout] = {}  # of flattened maps

    def run(self) -> None:
        for node in list(self._stage.graph.nodes):
            if node.op == "placeholder" and node.target in self._layouts:
                self.of[node] = self._layouts[node.target]
            elif node.op == "output":
                self._export(node)
            elif node.op != "placeholder" and not self._rewrite(node):
                self._narrow_inputs(node)
        for node, layout in self.of.items():
            node.meta[N_CHANNELS] = layout.width
        self._stage.graph.lint()
        self._stage.delete_all_unused_submodules()
        self._stage.recompile()

    def _export(self, node: fx.Node) -> None:
        outputs: Any = node.args[0]
        logits, *values = outputs
        if isinstance(logits, fx.Node):
            self._narrow_input(node, logits)
        names = self._stage.outputs[1:]
        self._layouts.update(
            {name: self.of[value] for name, value in zip(names, values, strict=True) if value in self.of}
        )

    def _rewrite(self, node: fx.Node) -> bool:
        """Adapt a node to widened maps; returns False if it cannot read them."""
        source = node.args[0] if node.args else None
        if is_concat(node):
            return self._concat(node)
        if not isinstance(source, fx.Node):
            return False
        if node.op == "call_module":
            return self._rewrite_module(node, source)
        if node.target == "flatten" or node.target is torch.flatten:
            if node.args[1:] != (1,) or source not in self.of or not _feeds_linear_alone(node, self._stage):
                return False
            self._flat[node] = self.of[source]
            return True
        if node.target in SUMS:
            maps = [self.of.get(arg) if isinstance(arg, fx.Node) else None for arg in node.args]
            return maps[0] is not None and all(layout == maps[0] for layout in maps) and self._follow(node, source)
        if node.target is operator.getitem:
            return self._first_channels(node, source)
        if node.target is getattr:
            return _asks_for_sides_alone(node)
        known = BY_CHANNEL_METHODS if node.op == "call_method" else BY_CHANNEL_FUNCTIONS
        return node.target in known and self._follow(node, source)

    def _rewrite_module(self, node: fx.Node, source: fx.Node) -> bool:
        module = self._stage.get_submodule(str(node.target))
        if isinstance(module, (nn.Conv2d, ConvRelu)):
            return self._convolution(node, source, module)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            if source not in self.of or not _feeds_linear_alone(node, self._stage):
                return False
            self._flat[node] = self.of[source]
            return True
        if isinstance(module, nn.Linear) and source in self._flat:
            self._linear(node, module, self._flat[source])
            return True
        return isinstance(module, BY_CHANNEL) and self._follow(node, source)

    def _follow(self, node: fx.Node, source: fx.Node) -> bool:
        for layouts in (self.of, self._flat):
            if source in layouts:
                layouts[node] = layouts[source]
        return True

    def _concat(self, node: fx.Node) -> bool:
        sources: Any = node.args[0]
        if not all(source in self.of for source in sources):
            return False
        positions: list[int] = []
        scales: tuple[float, ...] = ()
        width = 0
        for layout in (self.of[source] for source in sources):
            positions += [width + position for position in layout.positions]
            scales += layout.scales
            width += layout.width
        self.of[node] = Layout(tuple(positions), width, scales)
        return True

    def _first_channels(self, node: fx.Node, source: fx.Node) -> bool:
        item, layout = node.args[1], self.of.get(source)
        if layout is None or not isinstance(item, tuple) or len(item) != 2 or item[0] != slice(None):
            return False
        stop = item[1].stop if isinstance(item[1], slice) else None
        if not isinstance(stop, int) or not 0 < stop <= len(layout.positions) or item[1] != slice(None, stop):
            return False
        positions = layout.positions[:stop]
        width = min(layout.width, _up(positions[-1] + 1, self._multiple))  # nothing reads its other channels
        node.args = (source, (slice(None), slice(None, width)))
        self.of[node] = Layout(positions, width, layout.scales[:stop])
        return True

    def _convolution(self, node: fx.Node, source: fx.Node, module: nn.Conv2d | ConvRelu) -> bool:
        conv = module.conv if isinstance(module, ConvRelu) else module
        if conv.groups != 1 or conv.padding_mode != "zeros":
            return False
        before = self.of.get(source, plain(conv.in_channels))
        n_out, width = conv.out_channels, _up(conv.out_channels, self._multiple)
        weight = before.taking(conv.weight)
        scales = scales_for(weight, conv.bias, self._dtype)
        after = self.of[node] = Layout(tuple(range(n_out)), width, tuple(scales.tolist()))
        if before.is_plain and after.is_plain:
            return True
        wide = copy.deepcopy(conv)
        wide.in_channels, wide.out_channels = before.width, width
        weight *= scales.view(-1, 1, 1, 1)
        wide.weight = nn.Parameter(_longer(weight, width), requires_grad=False)
        if conv.bias is not None:
            wide.bias = nn.Parameter(_longer(conv.bias * scales, width), requires_grad=False)
        self._replace(node, module.around(wide) if isinstance(module, ConvRelu) else wide)
        return True

    def _linear(self, node: fx.Node, linear: nn.Linear, layout: Layout) -> None:
        if layout.is_plain:
            return
        wide = copy.deepcopy(linear)
        n_pixels = linear.in_features // len(layout.positions)
        wide.in_features = layout.width * n_pixels
        wide.weight = nn.Parameter(layout.taking(linear.weight, n_pixels), requires_grad=False)
        self._replace(node, wide)

    def _replace(self, node: fx.Node, module: nn.Module) -> None:
        name = f"wide_{node.name}"  # a new name: other nodes may call the narrow module
        self._stage.add_submodule(name, module)
        node.target = name

    def _narrow_inputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            self._narrow_input(node, source)

    def _narrow_input(self, node: fx.Node, source: fx.Node) -> None:
        layout = self.of.get(source)
        if layout is None or layout.is_plain:
            return
        name = f"real_channels_{source.name}_{node.name}"
        self._stage.register_buffer(name, torch.tensor(layout.positions))
        graph = self._stage.graph
        with graph.inserting_before(node):
            chosen = graph.call_function(torch.index_select, (source, 1, graph.get_attr(name)))
            if layout.is_scaled:
                self._stage.register_buffer(f"scales_of_{name}", torch.tensor(layout.scales).view(-1, 1, 1))
                own = graph.call_function(operator.truediv, (chosen, graph.get_attr(f"scales_of_{name}")))
                chosen = graph.call_method("type_as", (own, chosen))
        node.replace_input_with(source, chosen)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _longer(weight: Tensor, n: int) -> Tensor:
    return torch.cat([weight, weight.new_zeros((n - len(weight), *weight.shape[1:]))])


def _feeds_linear_alone(node: fx.Node, stage: Stage) -> bool:
    """Whether only linear layers read a node, possibly through changes of type or dropout."""
    for user in node.users:
        module = stage.get_submodule(str(user.target)) if user.op == "call_module" else None
        passes = isinstance(module, nn.Dropout) or (user.op == "call_method" and user.target in BY_CHANNEL_METHODS)
        if not isinstance(module, nn.Linear) and not (passes and _feeds_linear_alone(user, stage)):
            return False
    return True


def _asks_for_sides_alone(node: fx.Node) -> bool:
    """Whether a node is a map's shape, of which only height and width are read."""
    if node.args[1] != "shape":
        return False
    for user in node.users:
        item = user.args[1] if user.target is operator.getitem else None
        start = item.start if isinstance(item, slice) else item
        if not isinstance(start, int) or start < 2:
            return False
    return True
