"""Makes a bundle whose network computes nothing, for measuring the server around it.

Its first stage returns ten bytes of the image as logits, and every image leaves there. Its answers mean nothing.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from models.bundle import Bundle
from models.bundle_writing import write_bundle
from models.calibration import Calibration
from models.scores import plain_scores, score_exits

CLASSES = 10
HELD_OUT = 1_000
EXITS = ({"mflops": 1.0}, {"mflops": 2.0})  # nominal costs, because a budget must be above 0


def write_null_bundle(folder: Path, size_px: int = 32) -> Bundle:
    """Write the bundle to `folder` and return it: two exits, ten classes, images of `size_px`."""
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(HELD_OUT, CLASSES)).astype(np.float32)] * len(EXITS)
    scores = {name: score_exits(score, logits) for name, score in plain_scores(len(EXITS)).items()}
    calibration = Calibration(
        {name: values.astype(np.float32) for name, values in scores.items()},
        np.ones((HELD_OUT, len(EXITS)), bool),  # later exits are no better
    )
    with tempfile.TemporaryDirectory() as contents:
        stages = [_stage(Path(contents), number, size_px) for number in range(1, len(EXITS) + 1)]
        (Path(contents) / "README.md").write_text("A network that computes nothing: for benchmarks of the server.\n")
        return write_bundle(folder, _manifest(stages, size_px), calibration, Path(contents))


Value = dict[str, Any]


def _stage(contents: Path, number: int, size_px: int) -> dict[str, Any]:
    """Write a stage (the first takes the image, others ten numbers); returns its entry in the manifest."""
    image: Value = {"name": "images", "shape": [size_px, size_px, 3], "dtype": "uint8"}
    logits: Value = {"name": f"logits_{number}", "shape": [CLASSES], "dtype": "float32"}
    carried: Value = {"name": "carried", "shape": [CLASSES], "dtype": "float32"}
    inputs, outputs = ([image], [logits, carried]) if number == 1 else ([carried], [logits])
    if number == 1:
        axes = {"start": [0], "end": [CLASSES], "axis": [1]}
        nodes = [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("Slice", ["flat", *axes], ["few"]),
            helper.make_node("Cast", ["few"], ["logits_1"], to=TensorProto.FLOAT),
            helper.make_node("Identity", ["logits_1"], ["carried"]),
        ]
        constants = [helper.make_tensor(name, TensorProto.INT64, [1], value) for name, value in axes.items()]
    else:
        nodes, constants = [helper.make_node("Identity", ["carried"], [f"logits_{number}"])], []
    types = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    graph_inputs, graph_outputs = (
        [helper.make_tensor_value_info(v["name"], types[v["dtype"]], ["rows", *v["shape"]]) for v in values]
        for values in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, f"stage_{number}", graph_inputs, graph_outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path = contents / "stages" / f"stage_{number}.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return {
        "file": f"stages/stage_{number}.onnx",
        "inputs": inputs,
        "outputs": outputs,
        "state_bytes_per_row": 4 * CLASSES * (len(outputs) - 1),
    }


def _manifest(stages: list[dict[str, Any]], size_px: int) -> dict[str, Any]:
    exits = [
        {
            "published_mflops": exit_["mflops"],
            "executed_mflops": exit_["mflops"],
            "macs_m": exit_["mflops"],
            "executed_macs_m": exit_["mflops"],
            "test_accuracy": None,
            "heldout_accuracy": 1.0,
        }
        for exit_ in EXITS
    ]
    return {
        "name": "null",
        "description": "Computes nothing: for benchmarks of the server alone.",
        "architecture": "onnx",
        "arguments": {},
        "class_names": [f"nothing {i}" for i in range(CLASSES)],
        "input": {"height_px": size_px, "width_px": size_px, "mean": [0.0] * 3, "std": [1.0] * 3},
        "temperatures": [],
        "exits": exits,
        "stages": stages,
        "score": "logit_margin",
        "family": None,
        "predictor": None,
        "training": {"recipe": "none"},
        "data": {"name": "none", "split_sha256": None, "train_images": 0, "heldout_images": HELD_OUT, "test_images": 0},
    }
