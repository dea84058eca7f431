"""Traces a network into a graph: its operations in program order, and the first exit that needs each.

Both `models.cost` and `models.staging` use this graph, so that the cost charged is that of what runs.
"""

import copy
import inspect
import logging
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from models.shapes import without_data

NETWORK = "network."  # prefix of the names of the network's parts in a graph, and of no others
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class StagingError(ValueError):
    """A network cannot be cut into stages; the message names the cause and the fix."""


class _Proxy(fx.Proxy):
    """Records `x += y` as an in-place change; torch.fx itself would record `x = x + y`."""

    def _record(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._record(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._record(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._record(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._record(operator.itruediv, other)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise StagingError("it assigns into a tensor (x[...] = y): build it with torch.cat or torch.where")


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Never the network itself, even if it is one of PyTorch's own modules, such as DataParallel."""
        return f"{module_qualified_name}." != NETWORK and super().is_leaf_module(m, module_qualified_name)


class _Held(nn.Module):
    """Wraps a network, so that its parts cannot clash with attributes of a graph module: graph, code, inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


@dataclass(frozen=True)
class TracedNetwork:
    """A snapshot of a network in evaluation mode, as a graph over its images.

    Attributes:
        module: the graph and its weights, whose names are the network's own after `NETWORK`. All operations are out of
            place, so that one may run in a later stage than the operation after it in the program.
        images: the input.
        anchored: the number of rows and the device, which may be read from any value that depends on the images.
        exits: the logits of exits 1..N.
        values: the result of each operation, as a fake tensor of two rows.
    """

    module: fx.GraphModule
    images: fx.Node
    anchored: frozenset[fx.Node]
    exits: tuple[fx.Node, ...]
    values: dict[fx.Node, Any]

    def first_exits(self) -> dict[fx.Node, int]:
        """Map every operation that depends on the images to the first exit (1-based) that needs it, in program order.

        Operations that no exit needs are left out, and those that do not depend on the images: they are constants.
        """
        dependent = {self.images}
        for node in self.module.graph.nodes:
            if node not in self.anchored and any(source in dependent for source in node.all_input_nodes):
                dependent.add(node)
        first: dict[fx.Node, int] = {}
        for exit_number, logits in enumerate(self.exits, start=1):
            pending = [logits]
            while pending:
                node = pending.pop()
                if node in dependent and node not in first:
                    first[node] = exit_number
                    pending.extend(node.all_input_nodes)
        for node in self.module.graph.nodes:
            # An operation with several results runs once, and stages pass its tensors on, not the tuple.
            if node in first and node.target is operator.getitem and not isinstance(self.values[node.args[0]], Tensor):
                first[node] = first[node.args[0]]
        return {node: first[node] for node in self.module.graph.nodes if node in first}


def trace(network: nn.Module, images: Tensor, preprocess: nn.Module | None = None) -> TracedNetwork:
    """Trace a network into a graph.

    Args:
        network: any module whose `forward(images)` returns a list or tuple of logits [rows, classes], cheapest exit
            first, and which torch.fx can trace in evaluation mode.
        images: an example [rows, ...] of the shape, type and device; the number of rows does not matter.
        preprocess: applied to the images first, as one operation (normalisation).

    Raises:
        StagingError: the network does not meet these conditions.
    """
    held = _Held(copy.deepcopy(network)).eval()
    graph = _trace(held)
    module = fx.GraphModule(held, graph)
    image_node = next(node for node in graph.nodes if node.op == "placeholder")
    if preprocess is not None:
        module.add_submodule("preprocess", copy.deepcopy(preprocess).eval())
        with graph.inserting_after(image_node):
            normalised = graph.call_module("preprocess", (image_node,))
        image_node.replace_all_uses_with(normalised, delete_user_cb=lambda user: user is not normalised)
    with graph.inserting_after(image_node):
        rows = graph.call_method("size", (image_node, 0))
    values = other_values = _run_fake(module, images, n_rows=2)
    if any(node is not rows and _size(value, value, rows) is not None for node, value in values.items()):
        other_values = _run_fake(module, images, n_rows=3)  # distinguishes sizes that depend on the number of rows
    exits = _exits_of(network, graph, values)
    positions = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        _make_out_of_place(module, node, values, positions)
        _fix_sizes(node, rows, values[node], other_values[node])
    for part in module.modules():  # after the loop, because a module may be called several times
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]
    graph.lint()
    devices = {node for node, value in values.items() if isinstance(value, torch.device)}
    return TracedNetwork(module, image_node, frozenset(devices | {rows}), exits, values)


def _trace(held: _Held) -> fx.Graph:
    name = type(held.network).__name__
    try:
        return _Tracer().trace(held)
    except StagingError as error:
        raise StagingError(f"{name} cannot be staged: {error}") from None
    except Exception as error:  # torch.fx runs the network's own code, which may raise anything
        raise StagingError(
            f"torch.fx cannot trace {name}: {error}. A network with exits must not branch or loop on the values of "
            "tensors: compute every exit and return the list (the server decides on exits), and mark helper functions "
            "that torch.fx should not trace into with torch.fx.wrap"
        ) from error


def _run_fake(module: fx.GraphModule, images: Tensor, n_rows: int) -> dict[fx.Node, Any]:
    interpreter = fx.Interpreter(module, garbage_collect_values=False)
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # would log a stack trace before the error is raised
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with without_data(images), torch.no_grad():
        example = torch.empty(n_rows, *images.shape[1:], dtype=images.dtype, device=images.device)
        try:
            interpreter.run(example)
        except Exception as error:  # the network's own operations run here
            raise StagingError(
                f"the network fails on images of shape {tuple(example.shape)} and type {example.dtype}: {error}. Give "
                "an example of the shape and type that the network takes, on the network's own device"
            ) from error
        finally:
            logger.setLevel(level)
    return dict(interpreter.env)


def _exits_of(network: nn.Module, graph: fx.Graph, values: dict[fx.Node, Any]) -> tuple[fx.Node, ...]:
    returned = graph.output_node().args[0]
    name = type(network).__name__
    if not isinstance(returned, (list, tuple)) or not all(isinstance(node, fx.Node) for node in returned):
        raise StagingError(f"{name} does not return a list of logits: return [logits_1, ..., logits_N], cheapest first")
    exits: tuple[Any, ...] = tuple(returned)
    for number, node in enumerate(exits, start=1):
        shape = tuple(values[node].shape) if isinstance(values[node], Tensor) else None
        if shape is None or len(shape) != 2 or shape[0] != 2 or shape != tuple(values[exits[0]].shape):
            raise StagingError(
                f"exit {number} of {name} gives {shape or type(values[node]).__name__} for two images: every exit must "
                "give logits [rows, classes], with the same classes at every exit"
            )
    return exits


def _make_out_of_place(
    module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], positions: dict[fx.Node, int]
) -> None:
    """Make an in-place operation out of place, because its input may be read later or kept between stages."""
    changed, target = next(iter(node.all_input_nodes), None), node.target
    if changed is None or not isinstance(values.get(changed), Tensor):
        return
    if node.op == "call_module":
        if getattr(module.get_submodule(str(target)), "inplace", False) is not True:
            return
    elif target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[target]
    elif node.op == "call_method" and _ends_in_place(Tensor, str(target)):
        node.target = str(target)[:-1]
    elif node.op == "call_function" and _ends_in_place(torch, name := getattr(target, "__name__", "")):
        node.target = getattr(torch, name[:-1])
    elif node.op == "call_function" and (arguments := _inplace_arguments(node)) is not None:
        node.args, node.kwargs = arguments
    else:
        return
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: positions[user] > positions[node])


def _ends_in_place(where: object, name: str) -> bool:
    """Whether `name` is an in-place operation with an out-of-place counterpart in `where`."""
    return name.endswith("_") and not name.endswith("__") and hasattr(where, name[:-1])


def _inplace_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a function called with `inplace=True`, with `inplace=False` instead."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    if bound.arguments.get("inplace") is not True:
        return None
    bound.arguments["inplace"] = False
    return bound.args, bound.kwargs


def _fix_sizes(node: fx.Node, rows: fx.Node, value: Any, other_value: Any) -> None:
    """Replace sizes by constants or `rows`, so that no stage needs a map only for its shape."""
    if node is rows or (size := _size(value, other_value, rows)) is None:
        return
    for user in list(node.users):
        user.args = map_arg(user.args, lambda argument: size if argument is node else argument)
        user.kwargs = map_arg(user.kwargs, lambda argument: size if argument is node else argument)


def _size(value: Any, other_value: Any, rows: fx.Node) -> Any:
    """Classify a value seen at two and three rows: a constant, `rows` or a tuple of these; None if it is no size."""
    if isinstance(value, (tuple, list)):
        sizes = [_size(a, b, rows) for a, b in zip(value, other_value, strict=True)]
        return None if any(size is None for size in sizes) else tuple(sizes)
    if isinstance(value, (bool, int, float, torch.dtype)) and value == other_value:
        return value
    return rows if isinstance(value, int) and (value, other_value) == (2, 3) else None
