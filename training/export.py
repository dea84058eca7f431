"""Exports a trained network as stage graphs: one ONNX file per stage, all reading the same file of weights.

The weights are stored once, as trained, in a safetensors file. The graphs refer to them by file and offset (ONNX
external data), and the runtime folds normalisation into convolutions when it loads them. Weights that half precision
represents exactly are stored as such, in half the space, and the runtime widens them once, on loading.
"""

import json
import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from models.bundle import WEIGHTS
from models.normalise import Normalise
from models.staging import Stage, ValueSpec, split
from models.tracing import NETWORK

OPSET = 20


def export_stages(
    network: nn.Module,
    image_size_px: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    folder: Path,
) -> list[dict[str, Any]]:
    """Write `folder/stages/stage_K.onnx` for every exit K, and the weights that they share.

    Stage 1 takes images as uint8 [rows, height, width, 3] and normalises them. Every value has a free first axis
    (rows) and the name it has in `models.staging`.

    Args:
        network: any network that `models.staging.split` takes; it maps float images [rows, 3, height, width].
        image_size_px: one side of a square, or (height, width).
        folder: the bundle's; created if it is missing.

    Returns:
        For each stage, its description in the manifest: `file`, `inputs` and `outputs` (each `name`, `shape` without
        the rows, `dtype`; the logits first), `state_bytes_per_row` (kept for a row that goes on after this stage).

    Raises:
        StagingError: the network cannot be cut into stages.
    """
    height_px, width_px = (image_size_px, image_size_px) if isinstance(image_size_px, int) else image_size_px
    images = torch.randint(0, 256, (2, height_px, width_px, 3), dtype=torch.uint8)
    staged = split(network.cpu(), images, Normalise(mean, std))
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    weights = {name: _as_stored(value.detach()) for name, value in network.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(weights))
    half = {f"{NETWORK}{name}" for name, value in weights.items() if value.dtype == torch.float16}
    offsets = {f"{NETWORK}{name}": place for name, place in _read_offsets(folder / WEIGHTS).items()}
    descriptions, state = [], {"images": images}
    # A stage takes several seconds.
    for number, stage in enumerate(tqdm(staged.stages, "exporting", unit="stage", disable=None), start=1):
        file = f"stages/stage_{number}.onnx"
        inputs = tuple(state[name] for name in stage.inputs)
        model = _to_onnx(stage, inputs)
        _refer_to_weights(model, offsets, half)
        ir.save(model, folder / file)
        with torch.no_grad():
            state.update(zip(stage.outputs, stage(*inputs), strict=True))
        descriptions.append(
            {
                "file": file,
                "inputs": [_describe(staged.values[name]) for name in stage.inputs],
                "outputs": [_describe(staged.values[name]) for name in stage.outputs],
                "state_bytes_per_row": sum(spec.bytes_per_row for spec in staged.state_after(number)),
            }
        )
    return descriptions


def _describe(spec: ValueSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}


def _to_onnx(stage: Stage, inputs: tuple[Tensor, ...]) -> ir.Model:
    rows = torch.export.Dim("rows", min=1)
    with _quiet_exporter():
        program = torch.onnx.export(
            stage,
            inputs,
            dynamo=True,
            input_names=list(stage.inputs),
            output_names=list(stage.outputs),
            dynamic_shapes={name: {0: rows} for name in stage.inputs},
            opset_version=OPSET,
            optimize=False,  # otherwise the exporter folds normalisation into copies of the weights
            verbose=False,
        )
    assert program is not None  # only the old exporter (dynamo=False) returns None
    model = program.model
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    ClearMetadataAndDocStringPass()(model)  # they hold stack traces with this machine's paths
    made = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *made):
        value.metadata_props.clear()  # the exporter's internal notes, which take half of the file
    return model


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings about its internals and about torchvision, which is not used."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _read_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Location of each tensor in a safetensors file: name to (offset from the start of the file, length), in bytes."""
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    start = 8 + header_bytes
    return {
        name: (start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _as_stored(weight: Tensor) -> Tensor:
    """Copy a weight, in half precision if that changes no value (see `training.calibration.round_to_half`)."""
    if weight.dtype == torch.float32 and weight.ndim > 1 and torch.equal(weight.half().float(), weight):
        return weight.half().contiguous()
    return weight.clone().contiguous()


def _refer_to_weights(model: ir.Model, offsets: dict[str, tuple[int, int]], half: set[str]) -> None:
    for name, value in list(model.graph.initializers.items()):
        if name not in offsets or not isinstance(value.const_value, ir.Tensor):
            continue
        weight = value.const_value
        dtype = ir.DataType.FLOAT16 if name in half else weight.dtype
        stored = ir.ExternalTensor(WEIGHTS, *offsets[name], dtype, shape=weight.shape, name=name)
        if name in half:
            _widen(model.graph, name, value, stored)
        else:
            value.const_value = stored


def _widen(graph: ir.Graph, name: str, value: ir.Value, stored: ir.ExternalTensor) -> None:
    """Compute a float32 weight in the graph, by a cast of its stored half-precision values."""
    source = ir.Value(
        name=f"{name}_stored", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16), const_value=stored
    )
    del graph.initializers[name]
    value.const_value = None
    graph.register_initializer(source)
    cast = ir.Node("", "Cast", [source], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[value])
    graph.insert_before(graph[0], cast)
