"""The cost of each exit of a network, in multiply-adds.

The counting rules are those of every published early-exit curve, so that results are comparable: a convolution's
multiply-adds without its bias, a linear layer's weights and biases, one per element of a ReLU, k x k per output of
pooling. Nothing else in these networks counts: not normalisation, concatenation, resizing, softmax or the sum of an
ensemble. The rules do not cover attention and other matrix products, which count their multiply-adds here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.shapes import without_data
from models.tracing import TracedNetwork, trace


@dataclass(frozen=True)
class NetworkCost:
    """Cumulative cost of an image that leaves at exit 1..N (index 0 is exit 1).

    Attributes:
        published: all operations that the network's program runs up to that exit, as papers count them.
        executed: by the same rules, what the stages run: only what exits up to this one need. The server charges this.
        published_macs, executed_macs: multiply-adds of convolutions, linear layers and other matrix products only.
        parameters: of all modules that the program runs up to that exit.
    """

    published: tuple[int, ...]
    executed: tuple[int, ...]
    published_macs: tuple[int, ...]
    executed_macs: tuple[int, ...]
    parameters: tuple[int, ...]


@dataclass
class _Count:
    ops: int = 0
    macs: int = 0


def measure_cost(network: nn.Module, image_size_px: int) -> NetworkCost:
    """Count the multiply-adds and parameters of a network with exits, from shapes only.

    Args:
        network: maps images [rows, 3, image_size_px, image_size_px] to a list of logits (see `models.staging`). It may
            be on the meta device.

    Raises:
        StagingError: the network cannot be traced.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    traced = trace(network, torch.empty(1, 3, image_size_px, image_size_px, device=device))
    counts = _count(traced)
    first_exits = traced.first_exits()
    exit_numbers = range(1, len(traced.exits) + 1)
    # An exit is reached after the last counted operation that it needs: what follows, such as the sum of an ensemble,
    # may be anywhere in the program and costs nothing.
    counted = [(node, first) for node, first in first_exits.items() if counts[node].ops]
    order = list(traced.module.graph.nodes)
    positions = {node: i for i, node in enumerate(order)}
    program, executed = [], []
    for number in exit_numbers:
        last = max((positions[node] for node, first in counted if first <= number), default=-1)
        program.append(order[: last + 1])
        executed.append([node for node, first in first_exits.items() if first <= number])

    def total(parts: list[list[fx.Node]], count: Callable[[_Count], int]) -> tuple[int, ...]:
        return tuple(sum(count(counts[node]) for node in nodes) for nodes in parts)

    return NetworkCost(
        published=total(program, lambda c: c.ops),
        executed=total(executed, lambda c: c.ops),
        published_macs=total(program, lambda c: c.macs),
        executed_macs=total(executed, lambda c: c.macs),
        parameters=tuple(_parameters(traced, nodes) for nodes in program),
    )


def _count(traced: TracedNetwork) -> dict[fx.Node, _Count]:
    interpreter = _CountingInterpreter(traced.module, garbage_collect_values=False)
    images = traced.values[traced.images]
    # Inference mode would hide the matrix products inside functions.
    with without_data(images), torch.inference_mode(False), torch.no_grad():
        interpreter.run(torch.empty(1, *images.shape[1:], dtype=images.dtype, device=images.device))
    return interpreter.counts


def _parameters(traced: TracedNetwork, nodes: Iterable[fx.Node]) -> int:
    found: dict[int, int] = {}
    for node in nodes:
        if node.op == "call_module":
            parameters: Iterable[nn.Parameter] = traced.module.get_submodule(str(node.target)).parameters()
        elif node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            value = getattr(traced.module.get_submodule(path), name)
            parameters = [value] if isinstance(value, nn.Parameter) else []
        else:
            continue
        found.update((id(p), p.numel()) for p in parameters)
    return sum(found.values())


class _CountingInterpreter(fx.Interpreter):
    """Runs a graph and records the cost of each operation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts: dict[fx.Node, _Count] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.counts[n] = _Count()
        with _CountingMode(self.counts[n]):
            return super().run_node(n)


class _CountingMode(TorchFunctionMode):
    """Sums the cost of the functions called within it, whichever module or method calls them."""

    def __init__(self, count: _Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (rule := _RULES.get(func)) is None:
            with _ProductMode(self.count):
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        ops, macs = rule(result, *args, **kwargs)
        self.count.ops += ops
        self.count.macs += macs
        return result


class _ProductMode(TorchDispatchMode):
    """Sums the matrix products and convolutions inside functions that have no rule, at any depth."""

    def __init__(self, count: _Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (flops_of := _PRODUCTS.get(func.overloadpacket)) is not None:
            macs = flops_of(*args, **kwargs, out_val=result) // 2
            self.count.ops += macs
            self.count.macs += macs
        return result


def _convolution(output: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    macs = output.numel() * weight[0].numel()  # weight [out, in / groups, *kernel]
    return macs, macs


def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[int, int]:
    macs = output.numel() * weight.shape[1]
    return macs + (0 if bias is None else output.numel()), macs


def _relu(output: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    return output.numel(), 0


def _pooling(output: Any, input: Tensor, kernel_size: Any, *_: Any, **__: Any) -> tuple[int, int]:
    pooled = output[0] if isinstance(output, tuple) else output
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return pooled.numel() * kernel[0] * kernel[-1], 0


def _adaptive_pooling(output: Any, input: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    pooled = output[0] if isinstance(output, tuple) else output
    kernel = [n_in // n_out for n_in, n_out in zip(input.shape[-2:], pooled.shape[-2:], strict=True)]
    return pooled.numel() * kernel[0] * kernel[1], 0


_RULES: dict[Any, Callable[..., tuple[int, int]]] = {
    **dict.fromkeys((F.conv2d, torch.conv2d), _convolution),
    F.linear: _linear,
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    **dict.fromkeys((F.avg_pool2d, F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d), _pooling),
    **dict.fromkeys(
        (F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices), _adaptive_pooling
    ),
}

# From PyTorch's own counter, which lacks attention on CPUs; it counts 2 FLOPs per multiply-add.
_PRODUCTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
}
