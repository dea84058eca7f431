"""Cuts any network with exits into one stage per exit.

Every operation is assigned to the first exit that needs it, so stage k computes what logits k need beyond the earlier
stages. Maps are computed by the stage that first reads them ("lazy evaluation"), operations that no exit needs are
dropped, and the results are the same bit for bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.tracing import StagingError, TracedNetwork, trace

__all__ = ["Stage", "StagedNetwork", "StagingError", "ValueSpec", "split"]

IMAGES = "images"


@dataclass(frozen=True)
class ValueSpec:
    """A value passed between stages: its name, its shape without the batch axis, and its type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_row(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Stage(fx.GraphModule):
    """The operations that one exit adds: `forward(*inputs) -> tuple(outputs)`, all with the batch axis first.

    Attributes:
        inputs: names of the values it reads: `images`, or outputs of earlier stages.
        outputs: names of the values it returns: its exit's logits, then what later stages read.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class StagedNetwork:
    """The stages of a network, in order. They share one snapshot of its weights, in evaluation mode."""

    stages: list[Stage]
    values: dict[str, ValueSpec]

    def state_after(self, exit_number: int) -> tuple[ValueSpec, ...]:
        """The values to keep for a row that goes on after exit `exit_number` (1-based), as later stages read them."""
        made = {IMAGES}.union(*(stage.outputs for stage in self.stages[:exit_number]))
        read = [name for stage in self.stages[exit_number:] for name in stage.inputs]
        return tuple(self.values[name] for name in dict.fromkeys(read) if name in made)

    def run(self, images: Tensor) -> list[Tensor]:
        """Run all stages; return the logits [rows, classes] of every exit."""
        values = self.run_values(images)
        return [values[stage.outputs[0]] for stage in self.stages]

    def run_values(self, images: Tensor) -> dict[str, Tensor]:
        """Run all stages; return all their outputs and the images, by name."""
        values = {IMAGES: images}
        for stage in self.stages:
            outputs = stage(*(values[name] for name in stage.inputs))
            values.update(zip(stage.outputs, outputs, strict=True))
        return values


@torch.no_grad()
def split(network: nn.Module, example: Tensor, preprocess: nn.Module | None = None) -> StagedNetwork:
    """Cut a network with exits into stages, and check that their results agree with the network's.

    Args:
        network: a module that torch.fx can trace. Its `forward(images)` returns a list of N logits [rows, classes],
            cheapest first, and its rows do not influence each other in evaluation mode.
        example: images [rows, ...]; at least two different rows are needed to check that rows are independent. On the
            meta device nothing is checked.
        preprocess: applied to the images first, as part of stage 1.

    Raises:
        StagingError: the network does not meet these conditions; the message names the cause and the fix.
    """
    traced = trace(network, example, preprocess)
    staged = _assemble(traced)
    if not example.is_meta:
        _check(network, staged, example, preprocess)
    return staged


def _assemble(traced: TracedNetwork) -> StagedNetwork:
    first_exits = traced.first_exits()
    first_exits[traced.images] = 0
    names = _name_values(traced)
    last_readers = {
        node: max((first_exits[user] for user in node.users if user in first_exits), default=0) for node in first_exits
    }
    stages, values = [], {IMAGES: _spec(IMAGES, traced.values[traced.images])}
    for number, logits in enumerate(traced.exits, start=1):
        if logits not in first_exits:
            raise StagingError(f"exit {number} does not depend on the images")
        if first_exits[logits] != number:
            raise StagingError(
                f"exit {number} needs nothing beyond what exit {first_exits[logits]} computes: return every exit "
                "once, cheapest first"
            )
        own = [node for node, first in first_exits.items() if first == number]
        read = {source for node in own for source in node.all_input_nodes if first_exits.get(source, number) < number}
        kept = [node for node in own if last_readers[node] > number and node is not logits]
        for node in kept:
            values[names[node]] = _spec(names[node], traced.values[node])
        values[names[logits]] = _spec(names[logits], traced.values[logits])
        inputs = [node for node in first_exits if node in read]
        stages.append(_build_stage(traced, number, own, inputs, [logits, *kept], names))
    return StagedNetwork(stages, values)


def _name_values(traced: TracedNetwork) -> dict[fx.Node, str]:
    fixed = {traced.images: IMAGES} | {node: f"logits_{k}" for k, node in enumerate(traced.exits, start=1)}
    taken = set(fixed.values())
    return {
        node: fixed.get(node, f"{node.name}_value" if node.name in taken else node.name)
        for node in traced.module.graph.nodes
    }


def _spec(name: str, value: Any) -> ValueSpec:
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != 2:  # traced with two rows
        what = f"a tensor of shape {tuple(value.shape)} for two images" if isinstance(value, Tensor) else f"{value!r}"
        raise _no_rows(name, what)
    return ValueSpec(name, tuple(value.shape[1:]), value.dtype)


def _no_rows(name: str, what: str) -> StagingError:
    return StagingError(
        f"a later exit reads {name!r}, which is {what}: values passed between exits must be tensors whose first axis "
        "is the batch (move it there, for example by .transpose(0, 1), and back where it is read)"
    )


def _build_stage(
    traced: TracedNetwork,
    number: int,
    own: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    names: dict[fx.Node, str],
) -> Stage:
    graph = fx.Graph()
    built = {node: graph.placeholder(names[node]) for node in inputs}
    anchor = built[inputs[0]]

    def build(node: fx.Node) -> fx.Node:
        if node not in built:  # a constant, or the batch size or device, read from any input
            if node in traced.anchored:
                built[node] = graph.node_copy(node, lambda _: anchor)
            else:
                for source in node.all_input_nodes:
                    build(source)
                built[node] = graph.node_copy(node, lambda source: built[source])
        return built[node]

    for node in own:
        build(node)
    graph.output(tuple(built[node] for node in outputs))
    stage = Stage(traced.module, graph, f"Stage{number}")
    stage.inputs = tuple(names[node] for node in inputs)
    stage.outputs = tuple(names[node] for node in outputs)
    return stage


def _check(network: nn.Module, staged: StagedNetwork, example: Tensor, preprocess: nn.Module | None) -> None:
    was_training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        images = example.clone()  # the network may change them in place
        whole = network(images if preprocess is None else preprocess(images))
    finally:
        for module in was_training:
            module.training = True
    for number, (expected, logits) in enumerate(zip(whole, staged.run(example), strict=True), start=1):
        if not _close(expected, logits):
            raise StagingError(
                f"exit {number} returns other logits in stages than in the whole network: look for in-place changes of "
                "tensors that are read elsewhere, or for randomness in evaluation mode"
            )
    alone = staged.run_values(example[:1])
    for number, (expected, stage) in enumerate(zip(whole, staged.stages, strict=True), start=1):
        logits = alone[stage.outputs[0]]
        if logits.shape != expected[:1].shape:
            raise StagingError(
                f"exit {number} returns {tuple(logits.shape)} for one image, not {tuple(expected[:1].shape)}: look for "
                ".squeeze(), which drops the batch axis if there is one image, and use .flatten(1)"
            )
        if not _close(expected[:1], logits):
            raise StagingError(
                f"exit {number} returns other logits for an image alone than in a batch: rows must not influence each "
                "other in evaluation mode (look for statistics over the batch)"
            )
    for name, value in alone.items():
        if value.shape != (1, *staged.values[name].shape):  # its first axis had length 2 for another reason
            raise _no_rows(name, f"a tensor of shape {tuple(value.shape)} for one image")


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-3 * max(1.0, float(a.abs().max()))
    return torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)
