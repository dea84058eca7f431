"""Quantises the float stages of a bundle to int8 (weights and activations), for CPUs.

Static quantisation by ONNX Runtime, with one scale per tensor for activations and one per output channel for weights.
Weights use only 7 bits: CPUs without 8-bit dot products (AVX2, and AVX-512 without VNNI) add pairs of products in 16
bits, which 8-bit weights would overflow, and answers must be the same on every CPU. The first convolution stays float,
as three channels gain nothing, and so does the end of a head: pooling, linear layer and boosted sum.

The state that a row carries between stages is stored as bytes, too, channels last, as the int8 kernels read it.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from onnxruntime import quantization
from tqdm import tqdm

from models.bundle import Bundle
from models.manifest import StageInfo, ValueInfo
from training.stage_sessions import StageSessions, Values

FOLDER = "stages_int8"
OPERATORS = ["Conv", "Relu", "Concat"]
FEWEST_CHANNELS = 4  # input channels from which a convolution gains from int8
SAME_SCALE = 1e-3  # relative tolerance: both sides of a border have seen the same values, except for their last bits
CHANNELS_LAST, CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def quantise_stages(bundle: Bundle, images: NDArray[np.uint8], folder: Path) -> list[dict[str, Any]]:
    """Write `folder/stages_int8/stage_K.onnx`, weights included, for every float stage of a bundle.

    Args:
        bundle: with float stages.
        images: uint8 [images, height, width, 3]; the range of an activation over them becomes the range of its bytes.
        folder: of the bundle that is being made.

    Returns:
        Descriptions of the stages for the manifest, as from `training.export.export_stages`.
    """
    stages = bundle.manifest.stages
    sessions = StageSessions(bundle.path, stages)
    states = sessions.start(images)
    models = []
    for index, stage in enumerate(tqdm(stages, desc="quantising", unit="stage", disable=None)):
        feeds = [{value.name: state[value.name] for value in stage.inputs} for state in states]
        models.append(_quantise(_fold(bundle.path, stage), feeds))
        for state in states:
            sessions.advance(index, state)
    borders = _byte_borders(stages, models)
    (folder / FOLDER).mkdir(parents=True)
    described: list[dict[str, Any]] = []
    for number, (stage, model) in enumerate(zip(stages, models, strict=True), start=1):
        for value in stage.inputs:
            if value.name in borders:
                _take_bytes(model, value, borders[value.name])
        for value in stage.outputs:
            if value.name in borders:
                _give_bytes(model, value)
        del model.graph.value_info[:]  # types and shapes of values that have changed
        onnx.checker.check_model(model, full_check=True)
        file = f"{FOLDER}/stage_{number}.onnx"
        onnx.save(model, folder / file)
        described.append(
            {
                "file": file,
                "inputs": [_describe(value, value.name in borders) for value in stage.inputs],
                "outputs": [_describe(value, value.name in borders) for value in stage.outputs],
            }
        )
    for number, stage_described in enumerate(described, start=1):
        later = {value["name"] for stage in described[number:] for value in stage["inputs"]}
        kept = [v for stage in described[:number] for v in stage["outputs"] if v["name"] in later]
        stage_described["state_bytes_per_row"] = sum(prod(v["shape"]) * np.dtype(v["dtype"]).itemsize for v in kept)
    return described


@dataclass(frozen=True, slots=True)
class _Scale:
    """The quantisation of a tensor: a byte stands for (byte - zero_point) x scale."""

    scale: NDArray[np.float32]
    zero_point: NDArray[np.uint8]

    def agrees(self, other: "_Scale | None") -> bool:
        return (
            other is not None
            and self.zero_point == other.zero_point
            and bool(np.isclose(self.scale, other.scale, rtol=SAME_SCALE, atol=0))
        )


def _fold(bundle_path: Path, stage: StageInfo) -> onnx.ModelProto:
    """Load a stage's graph, weights included, with every normalisation folded into the convolution before it."""
    model = onnx.load(bundle_path / stage.file, load_external_data=False)
    load_external_data_for_model(model, str(bundle_path))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with TemporaryDirectory() as made:
        options.optimized_model_filepath = str(Path(made, "folded.onnx"))
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


class _Feeds(quantization.CalibrationDataReader):
    def __init__(self, feeds: Sequence[Values]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Values | None:
        return next(self._feeds, None)


def _quantise(model: onnx.ModelProto, feeds: Sequence[Values]) -> onnx.ModelProto:
    channels = {tensor.name: tensor.dims[1] for tensor in model.graph.initializer if len(tensor.dims) > 1}
    narrow = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and channels.get(node.input[1], FEWEST_CHANNELS) < FEWEST_CHANNELS
    ]
    with TemporaryDirectory() as made, _quiet_quantiser():
        quantization.quantize_static(
            model,
            Path(made, "quantised.onnx"),
            _Feeds(feeds),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            nodes_to_exclude=narrow,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return onnx.load(Path(made, "quantised.onnx"))


@contextmanager
def _quiet_quantiser() -> Iterator[None]:
    """Silence the quantiser's warnings, such as its advice to pre-process the model, which `_fold` has done."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _byte_borders(stages: Sequence[StageInfo], models: Sequence[onnx.ModelProto]) -> dict[str, _Scale]:
    """Find the values that can pass between stages as bytes: producer and all consumers quantise them alike."""
    borders = {}
    for stage, model in zip(stages, models, strict=True):
        for value in stage.outputs:
            given = _scale_of(model, _giver(model, value.name))
            readers = [
                _scale_of(m, _taker(m, value.name))
                for s, m in zip(stages, models, strict=True)
                if value.name in {read.name for read in s.inputs}
            ]
            if given is not None and readers and all(given.agrees(read) for read in readers):
                borders[value.name] = given
    return borders


def _giver(model: onnx.ModelProto, name: str) -> onnx.NodeProto | None:
    """The DequantizeLinear that produces a value; None if another kind of node does."""
    return next((n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.output[0] == name), None)


def _taker(model: onnx.ModelProto, name: str) -> onnx.NodeProto | None:
    """The QuantizeLinear that reads a value; None if another kind of node does, or more than one."""
    readers = [node for node in model.graph.node if name in node.input]
    return readers[0] if len(readers) == 1 and readers[0].op_type == "QuantizeLinear" else None


def _scale_of(model: onnx.ModelProto, node: onnx.NodeProto | None) -> _Scale | None:
    if node is None:
        return None
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    scale, zero_point = (numpy_helper.to_array(by_name[name]) for name in node.input[1:3])
    return _Scale(scale, zero_point) if scale.ndim == 0 and zero_point.dtype == np.uint8 else None


def _take_bytes(model: onnx.ModelProto, value: ValueInfo, scale: _Scale) -> None:
    """Change a graph's input to bytes, and remove the node that quantised it."""
    graph = model.graph
    quantise = _taker(model, value.name)
    assert quantise is not None  # see `_byte_borders`
    by_name = {tensor.name: tensor for tensor in graph.initializer}
    for name, array in {quantise.input[1]: scale.scale, quantise.input[2]: scale.zero_point}.items():
        by_name[name].CopyFrom(numpy_helper.from_array(np.asarray(array), name))
    inside = f"{value.name}_bytes"
    _rename_reads(graph, quantise.output[0], inside)
    graph.node.remove(quantise)
    graph.node.insert(0, _moved(value.name, inside, value, CHANNELS_FIRST))
    _declare_bytes(graph.input, value)


def _give_bytes(model: onnx.ModelProto, value: ValueInfo) -> None:
    """Change a graph's output to bytes, and remove the node that widened it if nothing else reads its result."""
    graph = model.graph
    widen = _giver(model, value.name)
    assert widen is not None  # see `_byte_borders`
    widened = f"{value.name}_widened"
    _rename_reads(graph, value.name, widened)
    widen.output[0] = widened
    graph.node.append(_moved(widen.input[0], value.name, value, CHANNELS_LAST))
    if not any(widened in node.input for node in graph.node):
        graph.node.remove(widen)
    _declare_bytes(graph.output, value)


def _moved(source: str, target: str, value: ValueInfo, axes: list[int]) -> onnx.NodeProto:
    if len(value.shape) == 3:
        return helper.make_node("Transpose", [source], [target], name=f"move_{target}", perm=axes)
    return helper.make_node("Identity", [source], [target], name=f"move_{target}")


def _rename_reads(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _declare_bytes(declared: Any, value: ValueInfo) -> None:
    """Declare one of a graph's inputs or outputs as bytes."""
    info = next(info for info in declared if info.name == value.name)
    rows = info.type.tensor_type.shape.dim[0].dim_param
    shape = [rows, *_shape_in_bytes(value)]
    info.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.UINT8, shape))


def _shape_in_bytes(value: ValueInfo) -> list[int]:
    return [*value.shape[1:], value.shape[0]] if len(value.shape) == 3 else list(value.shape)


def _describe(value: ValueInfo, in_bytes: bool) -> dict[str, Any]:
    if in_bytes:
        return {"name": value.name, "shape": _shape_in_bytes(value), "dtype": "uint8"}
    return {"name": value.name, "shape": list(value.shape), "dtype": value.dtype}
