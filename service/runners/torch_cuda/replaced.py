"""What takes the place of parts of a lowered stage whose work the device's own kernels do.

A compiler that looks into them finds torch's operations.
"""

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models.staging import Stage
from service.runners.torch_cuda.kernels import Kernels

N_CHANNELS = "n_channels"
"""What a node of a map says of it, in `meta`."""


class Concat(nn.Module):
    """Maps beside each other along their channels.

    Args:
        room: channels there is to be place for from pixel to pixel.
        appends: whether the first map has come from one of these, with room for the others.
    """

    def __init__(self, kernels: Kernels, room: int = 0, appends: bool = False) -> None:
        super().__init__()
        self._kernels, self.room, self.appends = kernels, room, appends

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.cat(list(maps), 1)
        if self.appends:
            return self._kernels.append(maps[0], maps[1:], self.room)
        return self._kernels.concat(maps, self.room)


class MaxPool(nn.Module):
    """Of squares, without telling where the largest lies."""

    def __init__(self, size: int, stride: int, padding: int, kernels: Kernels) -> None:
        super().__init__()
        self._size, self._stride, self._padding, self._kernels = size, stride, padding, kernels

    def forward(self, x: Tensor) -> Tensor:
        how = self._size, self._stride, self._padding
        return F.max_pool2d(x, *how) if torch.compiler.is_compiling() else self._kernels.max_pool(x, *how)


def replace_maps(stage: Stage, kernels: Kernels) -> None:
    """Have maps put beside each other and pooled by kernels, as far as there are some."""
    for node in list(stage.graph.nodes):
        made: nn.Module | None = None
        if is_concat(node) and "concat" in kernels:
            made, arguments = Concat(kernels), (node.args[0],)
        elif node.op == "call_module" and "max_pool" in kernels:
            module = stage.get_submodule(node.target)
            made, arguments = _as_max_pool(module, kernels), (node.args[0],)
        if made is None:
            continue
        name = f"kernel_{node.name}"
        stage.add_submodule(name, made)
        with stage.graph.inserting_before(node):
            new = stage.graph.call_module(name, arguments)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        stage.graph.erase_node(node)
    stage.delete_all_unused_submodules()
    stage.recompile()


def is_concat(node: fx.Node) -> bool:
    """Whether a node puts maps beside each other along their channels."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return bool(dim == 1) and not set(node.kwargs) - {"dim"} and isinstance(node.args[0], (list, tuple))


def _as_max_pool(module: nn.Module, kernels: Kernels) -> MaxPool | None:
    if not isinstance(module, nn.MaxPool2d) or module.return_indices or module.ceil_mode:
        return None
    numbers = [_one(number) for number in (module.kernel_size, module.stride, module.padding, module.dilation)]
    if any(number is None for number in numbers) or numbers[3] != 1:
        return None
    size, stride, padding = map(operator.index, numbers[:3])  # type: ignore[arg-type]
    return MaxPool(size, stride, padding, kernels)


def _one(number: int | tuple[int, ...]) -> int | None:
    """The number of both sides; None: they have two."""
    both = (number, number) if isinstance(number, int) else number
    return both[0] if both[0] == both[1] else None
