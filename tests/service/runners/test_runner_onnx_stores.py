"""The stores of the ONNX runner on a device: a million rows through graphs whose values identify their rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from models.bundle import Bundle
from models.manifest import StageInfo, ValueInfo
from service.runners.blocks import RowState, keep
from service.runners.onnx_device.runner import OnnxDeviceRunner
from tests.service.slotted import all_free


def counting_stages(folder: Path, n_stages: int) -> list[StageInfo]:
    """Stages whose rows say who they are: exit k tells 10 x image + j for every stage j up to it, as row and as map."""
    one = (1,)

    def value(name: str, shape: tuple[int, ...] = one) -> ValueInfo:
        return ValueInfo(name=name, shape=list(shape), dtype="float32")

    def info(of: ValueInfo) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(of.name, TensorProto.FLOAT, ["rows", *of.shape])

    stages = []
    for k in range(n_stages):
        source = "images" if k == 0 else "image"
        inputs = [value("images")] if k == 0 else [value("image"), value("map", (2, 3)), *map(value, made(k))]
        outputs = [value(f"logits_{k + 1}", (k + 2,)), value(f"made_{k}")]
        nodes = [
            helper.make_node("Mul", [source, "ten"], ["tens"]),
            helper.make_node("Add", ["tens", "stage"], [f"made_{k}"]),
        ]
        if k == 0:
            outputs += [value("image"), value("map", (2, 3))]
            nodes += [
                helper.make_node("Identity", ["images"], ["image"]),
                helper.make_node("Reshape", ["images", "as map"], ["cells"]),
                helper.make_node("Expand", ["cells", "map shape"], ["map"]),
                helper.make_node("Identity", ["images"], ["cell"]),
            ]
        else:
            nodes.append(helper.make_node("ReduceMax", ["map", "map axes"], ["cells"], keepdims=1))
            nodes.append(helper.make_node("Squeeze", ["cells", "last axis"], ["cell"]))
        nodes.append(helper.make_node("Concat", [*made(k + 1), "cell"], [f"logits_{k + 1}"], axis=1))
        constants = [
            helper.make_tensor("ten", TensorProto.FLOAT, [], [10.0]),
            helper.make_tensor("stage", TensorProto.FLOAT, [], [float(k)]),
            helper.make_tensor("as map", TensorProto.INT64, [3], [-1, 1, 1]),
            helper.make_tensor("map shape", TensorProto.INT64, [3], [1, 2, 3]),
            helper.make_tensor("map axes", TensorProto.INT64, [2], [1, 2]),
            helper.make_tensor("last axis", TensorProto.INT64, [1], [2]),
        ]
        used = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            "counting",
            [info(one) for one in inputs],
            [info(one) for one in outputs],
            [constant for constant in constants if constant.name in used],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        (folder / f"stage_{k + 1}.onnx").write_bytes(model.SerializeToString())
        stages.append(StageInfo(file=f"stage_{k + 1}.onnx", inputs=inputs, outputs=outputs, state_bytes_per_row=0))
    return stages


def made(n_stages: int) -> list[str]:
    return [f"made_{j}" for j in range(n_stages)]


def test_of_a_million_regrouped_rows_none_is_lost_duplicated_or_swapped(bundle: Bundle, tmp_path: Path) -> None:
    """Rows start, continue in random batches, and leave at random; each finds its own values, once per stage."""
    n_images, n_stages, max_rows, in_flight = 1_000_000, 3, 8192, 20_000
    manifest = bundle.manifest.model_copy(update={"stages": counting_stages(tmp_path, n_stages)})
    runner = OnnxDeviceRunner(Bundle(tmp_path, manifest, bundle.calibration), "cpu", max_rows, in_flight)
    for bucket in runner.buckets[6:]:
        for stage in range(n_stages):
            for lane in runner.lanes:
                lane.prepare(stage, bucket)
    runner.buckets = runner.buckets[6:]
    rng = np.random.default_rng(0)
    waiting: list[list[tuple[int, RowState]]] = [[] for _ in range(n_stages)]
    passed = np.zeros((n_stages, n_images), np.int8)
    n_started = n_ended = 0
    while n_ended < n_images:
        room = min(in_flight - sum(map(len, waiting)), n_images - n_started)
        ready = [stage for stage in range(1, n_stages) if waiting[stage]] + [0] * (room > 0)
        stage, size = int(rng.choice(ready)), int(rng.integers(1, max_rows))
        if stage == 0:
            ids = np.arange(n_started, n_started + min(size, room))
            rows: Sequence[RowState] = [runner.first_state(image) for image in ids.astype(np.float32)[:, None]]
            n_started += len(ids)
        else:
            order = rng.permutation(len(waiting[stage]))
            batch = [waiting[stage][i] for i in order[:size]]
            waiting[stage] = [waiting[stage][i] for i in order[size:]]
            ids, rows = np.array([i for i, _ in batch]), [row for _, row in batch]
            del batch
        output = runner.run(stage, rows)
        np.testing.assert_array_equal(output.logits[:, :-1], ids[:, None] * 10 + np.arange(stage + 1))
        np.testing.assert_array_equal(output.logits[:, -1], ids)
        passed[stage, ids] += 1
        stays = np.flatnonzero(rng.random(len(ids)) < (0.6 if stage + 1 < n_stages else 0.0))
        n_ended += len(ids) - len(stays)
        if len(stays):
            waiting[stage + 1] += zip(ids[stays].tolist(), keep(output.block, stays.tolist()), strict=True)
        del rows, output
    assert (passed[0] == 1).all()
    assert (passed <= 1).all()
    assert (np.diff(passed, axis=0) <= 0).all()
    del waiting
    assert all_free(runner.slots)
