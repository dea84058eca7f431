"""Extends a stage's graph so that the state of rows stays in slots on the device.

Each value that a later stage reads has one tensor [slots, ...], its *store*. The graph gathers its inputs by the rows'
slots, and scatters its outputs into stores. A store that is written is both an input and an output of the graph, bound
to the same memory, so only the rows of the batch are written and nothing else is copied.
"""

from collections.abc import Set
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from models.manifest import StageInfo, ValueInfo
from models.onnx_weights import StageLoadError
from service.runners.agreement import InGraph, check_agreement

SLOTS = "exitserve.slots"  # int64 [rows]
STORE_OPERATORS = ("Gather", "Unsqueeze", "Expand", "ScatterElements")
"""The operators that are added. They run on CUDA even with TensorRT, which cannot write to its inputs."""


def store(name: str) -> str:
    """The name in graphs of a value's store."""
    return f"exitserve.store.{name}"


def stored(name: str) -> str:
    """The name of the same store as an output, once the rows of a batch have been written to it."""
    return f"exitserve.stored.{name}"


def with_slots(path: Path, stage: StageInfo, kept: Set[str], n_slots: int) -> bytes:
    """Return the graph at `path`, extended to read and write stores of `n_slots` rows. Weights in files stay there.

    Inputs: the stores of the values in `kept` that the stage reads or writes, its other inputs, and `SLOTS`.
    Outputs: the logits, and the stores that the stage writes.

    Args:
        kept: names of values that a later stage reads.

    Raises:
        StageLoadError: the file cannot be read, or its graph is not what the manifest says.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's and onnx's errors have no common base
        raise StageLoadError(f"{path}: {error}; restore the bundle or export it again") from error
    graph = model.graph
    constant = {weight.name for weight in graph.initializer}
    inputs, outputs = [_declared(v) for v in graph.input if v.name not in constant], map(_declared, graph.output)
    check_agreement(path, stage, inputs, list(outputs))
    read = [value for value in stage.inputs if value.name in kept]
    written = [value for value in stage.outputs if value.name in kept]
    gathers = [helper.make_node("Gather", [store(v.name), SLOTS], [v.name], axis=0) for v in read]
    scatters = [node for value in written for node in _scatter(value)]
    constants = [constant for value in written for constant in _constants(value)]
    extended = helper.make_graph(
        [*gathers, *graph.node, *scatters],
        graph.name,
        [
            *(declared for declared in graph.input if declared.name not in kept),
            *(_tensor(store(value.name), value, n_slots) for value in (*read, *written)),
            helper.make_tensor_value_info(SLOTS, TensorProto.INT64, ["rows"]),
        ],
        [
            *(declared for declared in graph.output if declared.name == stage.outputs[0].name),
            *(_tensor(stored(value.name), value, n_slots) for value in written),
        ],
        [*graph.initializer, *constants],
    )
    graph.CopyFrom(extended)
    data: bytes = model.SerializeToString()
    return data


def _declared(value: ValueInfoProto) -> InGraph:
    tensor = value.type.tensor_type
    shape = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
    dtype = TensorProto.DataType.Name(tensor.elem_type).lower()
    return InGraph(value.name, dtype, shape if tensor.HasField("shape") else None)


def _constants(value: ValueInfo) -> list[TensorProto]:
    axes, shape, rank = _name("axes", value), _name("shape", value), len(value.shape)
    return [
        helper.make_tensor(axes, TensorProto.INT64, [rank], range(1, 1 + rank)),
        helper.make_tensor(shape, TensorProto.INT64, [1 + rank], [1, *value.shape]),
    ]


def _scatter(value: ValueInfo) -> list[NodeProto]:
    """Write rows of a value to their slots. On CUDA, this has one thread per element; ScatterND has one per row."""
    column, where = _name("column", value), _name("where", value)
    return [
        helper.make_node("Unsqueeze", [SLOTS, _name("axes", value)], [column]),
        helper.make_node("Expand", [column, _name("shape", value)], [where]),
        helper.make_node("ScatterElements", [store(value.name), where, value.name], [stored(value.name)], axis=0),
    ]


def _name(what: str, value: ValueInfo) -> str:
    return f"exitserve.{what}.{value.name}"


def _tensor(name: str, value: ValueInfo, n_slots: int) -> ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
    return helper.make_tensor_value_info(name, kind, [n_slots, *value.shape])
