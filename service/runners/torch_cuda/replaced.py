"""Replaces concatenation and max pooling in a lowered stage by modules that call the custom kernels.

While a compiler traces them, these modules use torch's operations.
"""

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models.staging import Stage
from service.runners.torch_cuda.kernels import Kernels

N_CHANNELS = "n_channels"
"""The key in a node's `meta` of the number of channels of its map."""


class Concat(nn.Module):
    """Concatenates maps along their channels.

    Args:
        room: for how many channels each pixel of the result has room.
        appends: whether the first map already has room for the others; see `growing`.
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
    """Max pooling over squares, without indices."""

    def __init__(self, size: int, stride: int, padding: int, kernels: Kernels) -> None:
        super().__init__()
        self._size, self._stride, self._padding, self._kernels = size, stride, padding, kernels

    def forward(self, x: Tensor) -> Tensor:
        how = self._size, self._stride, self._padding
        return F.max_pool2d(x, *how) if torch.compiler.is_compiling() else self._kernels.max_pool(x, *how)


def replace_maps(stage: Stage, kernels: Kernels) -> None:
    """Replace concatenations and max pooling by custom kernels, as far as `kernels` has them."""
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
    """Whether a node concatenates maps along their channels."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return bool(dim == 1) and not set(node.kwargs) - {"dim"} and isinstance(node.args[0], (list, tuple))


def _as_max_pool(module: nn.Module, kernels: Kernels) -> MaxPool | None:
    if not isinstance(module, nn.MaxPool2d) or module.return_indices or module.ceil_mode:
        return None
    numbers = [_of_square(number) for number in (module.kernel_size, module.stride, module.padding, module.dilation)]
    if any(number is None for number in numbers) or numbers[3] != 1:
        return None
    size, stride, padding = map(operator.index, numbers[:3])  # type: ignore[arg-type]
    return MaxPool(size, stride, padding, kernels)


def _of_square(number: int | tuple[int, ...]) -> int | None:
    """The number if it is the same for both sides, else None."""
    both = (number, number) if isinstance(number, int) else number
    return both[0] if both[0] == both[1] else None
