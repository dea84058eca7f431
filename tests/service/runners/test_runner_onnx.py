"""The ONNX runner: the network's answers, independent of the batch, with no more copies than documented."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from models.bundle import load_bundle
from models.onnx_weights import StageLoadError
from service.runners.base import RunnerError
from service.runners.blocks import Block, Gathering, RowState, keep
from service.runners.onnx import OnnxRunner
from service.runners.onnx_device.runner import OnnxDeviceRunner
from tests.bundles import MEAN, REPOSITORY, STD, random_images, read_manifest, seal, tiny_network
from training.export import Normalise

MAX_ROWS = 16


@pytest.fixture(scope="module")
def runner(folder) -> OnnxRunner:
    return OnnxRunner(load_bundle(folder), MAX_ROWS, n_lanes=2)


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return random_images(48, seed=5)


@pytest.fixture(scope="module")
def alone(runner, images) -> list[NDArray[np.float32]]:
    """The logits [48, classes] of every stage, with each image alone in its batch."""
    logits: list[list[NDArray[np.float32]]] = [[] for _ in range(runner.n_stages)]
    for image in images:
        rows: Sequence[RowState] = [runner.first_state(image)]
        for stage in range(runner.n_stages):
            output = runner.run(stage, rows)
            logits[stage].append(output.logits[0])
            rows = output.states
    return [np.stack(rows) for rows in logits]


def test_it_gives_the_whole_networks_answers(alone, images):
    with torch.no_grad():
        whole = tiny_network()(Normalise(MEAN, STD)(torch.from_numpy(images)))
    assert len(whole) == len(alone)
    for expected, logits in zip(whole, alone, strict=True):
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_bitwise_independent_of_the_batch(runner, images, alone, seed):
    """At every stage, rows leave at random and the rest is regrouped with rows of other batches, in any order."""
    rng = np.random.default_rng(seed)
    waiting = [(i, runner.first_state(image)) for i, image in enumerate(images)]
    for stage in range(runner.n_stages):
        survivors = []
        order = rng.permutation(len(waiting)) if seed % 2 else np.arange(len(waiting))
        while len(order):
            size = int(rng.integers(1, MAX_ROWS + 1))
            batch, order = [waiting[j] for j in order[:size]], order[size:]
            output = runner.run(stage, [row for _, row in batch])
            for (i, _), logits in zip(batch, output.logits, strict=True):
                assert np.array_equal(logits, alone[stage][i])
            if stage + 1 == runner.n_stages:
                assert not output.block.values
                continue
            kept = [j for j in range(len(batch)) if rng.random() < 0.8]
            survivors += [(batch[j][0], state) for j, state in zip(kept, keep(output.block, kept), strict=True)]
        waiting = survivors
        assert waiting or stage + 1 == runner.n_stages


def test_lanes_are_independent(runner, images, alone):
    def through(part: int) -> list[NDArray[np.float32]]:
        logits, rows = [], [runner.first_state(image) for image in images[part::4]]
        for stage in range(runner.n_stages):
            output = runner.run(stage, rows[:1])
            rest = runner.run(stage, rows[1:])
            logits.append(np.concatenate([output.logits, rest.logits]))
            rows = [*output.states, *rest.states]  # from two blocks, so that they are gathered
        return logits

    with ThreadPoolExecutor(4) as lanes:
        results = list(lanes.map(through, [0, 1, 2, 3] * 5))
    for i, logits in enumerate(results):
        for stage in range(runner.n_stages):
            assert np.array_equal(logits[stage], alone[stage][i % 4 :: 4])


def test_rows_that_continue_together_are_not_copied(runner, images):
    output = runner.run(0, [runner.first_state(image) for image in images[:8]])
    name = runner.stages[1].inputs[0].name
    batch = output.states[0].block.values[name]
    assert np.shares_memory(Gathering(output.states).take(name), batch)
    assert np.shares_memory(Gathering(output.states[2:5]).take(name), batch)
    assert not np.shares_memory(Gathering([output.states[2], output.states[4]]).take(name), batch)


def test_gathering_keeps_the_order_and_uses_the_given_buffer():
    blocks = [Block({"x": np.arange(100 * k, 100 * k + 20).reshape(10, 2)}, 10) for k in range(3)]
    picks = [(0, 3), (0, 4), (2, 9), (2, 0), (1, 5), (0, 5)]
    rows = [RowState(blocks[b], i) for b, i in picks]
    expected = np.stack([blocks[b].values["x"][i] for b, i in picks])
    buffer = np.zeros((6, 2), np.int64)
    assert Gathering(rows).take("x", buffer) is buffer
    np.testing.assert_array_equal(buffer, expected)
    np.testing.assert_array_equal(Gathering(rows).take("x"), expected)


def test_few_survivors_do_not_keep_a_large_block_alive():
    block = Block({"x": np.arange(64).reshape(32, 2)}, 32)
    few = keep(block, [3, 30, 31])
    assert few[0].block is few[2].block is not block
    assert few[0].block.bytes == block.bytes * 3 // 32
    np.testing.assert_array_equal(Gathering(few).take("x"), block.values["x"][[3, 30, 31]])
    assert keep(block, range(9)) == [RowState(block, i) for i in range(9)]
    assert keep(block, []) == []


@pytest.mark.parametrize(
    "image", [np.zeros((32, 31, 3), np.uint8), np.zeros((32, 32, 3), np.float32), np.zeros((3, 32, 32), np.uint8)]
)
def test_an_image_of_another_shape_or_type_is_refused(runner, image):
    with pytest.raises(ValueError, match=r"but the network takes uint8 \(32, 32, 3\)"):
        runner.first_state(image)


@pytest.mark.parametrize("opened", [lambda b: OnnxRunner(b, MAX_ROWS, 1), lambda b: OnnxDeviceRunner(b, "cpu", 4, 8)])
@pytest.mark.parametrize(("kind", "value"), [("shape", [3]), ("shape", [10, 1]), ("dtype", "float16")])
def test_graphs_that_contradict_the_manifest_are_refused_at_the_start(bundle_path, kind, value, opened):
    """Logits of more classes than there are names would break the engine at the first image."""
    manifest = read_manifest(bundle_path)
    name = "logits_1" if value == [3] else manifest["stages"][0]["outputs"][1]["name"]
    if value == [3]:
        manifest["class_names"] = manifest["class_names"][:3]
    for stage in manifest["stages"]:
        for described in (*stage["inputs"], *stage["outputs"]):
            if described["name"] == name or (value == [3] and described["name"].startswith("logits")):
                described[kind] = value
    seal(bundle_path, manifest)
    with pytest.raises(StageLoadError, match=rf"stage_1\.onnx: the graph gives '{name}' as float32 .* manifest says"):
        opened(load_bundle(bundle_path))


def test_a_failing_stage_is_named_and_the_runner_stays_usable(runner, images, alone):
    wrong = RowState(Block({value.name: np.zeros((1, 7), np.float32) for value in runner.stages[1].inputs}, 1), 0)
    with pytest.raises(RunnerError, match="stage 2 failed on a batch of 1"):
        runner.run(1, [wrong])
    output = runner.run(0, [runner.first_state(images[0])])
    assert np.array_equal(output.logits[0], alone[0][0])


def test_warm_up_runs_every_stage_at_the_smallest_and_largest_batch(runner):
    times = runner.warm_up()
    assert len(times) == runner.n_stages
    for seconds_by_rows in times:
        assert {1, MAX_ROWS} <= set(seconds_by_rows)
        assert all(seconds > 0 for seconds in seconds_by_rows.values())


def put_behind_logits(bundle_path: Path, stage: int, operator: str, *operands: NDArray[Any]) -> None:
    """Let an operator, with constant further operands, change the logits of a stage (from 1) of a bundle."""
    path = bundle_path / f"stages/stage_{stage}.onnx"
    model = onnx.load(path, load_external_data=False)
    logits = model.graph.output[0].name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["original" if name == logits else name for name in names]
    constants = [onnx.numpy_helper.from_array(operand, f"operand {i}") for i, operand in enumerate(operands)]
    model.graph.initializer.extend(constants)
    inputs = ["original", *(constant.name for constant in constants)]
    model.graph.node.append(onnx.helper.make_node(operator, inputs, [logits]))
    path.write_bytes(model.SerializeToString())
    seal(bundle_path)


def test_a_graph_that_loses_rows_is_refused_at_the_start(bundle_path):
    """Its sizes are dynamic, so only a run shows the fault: the engine would break at the first batch of two."""
    put_behind_logits(bundle_path, 2, "Slice", np.array([0]), np.array([1]))
    runner = OnnxRunner(load_bundle(bundle_path), max_rows=4, n_lanes=1)
    told = r"stage_2\.onnx: for 4 rows the graph gives 'logits_2' as \(1, 10\) where the manifest says \(4, 10\)"
    with pytest.raises(RunnerError, match=told):
        runner.warm_up()


@pytest.mark.parametrize("make", [OnnxRunner, partial(OnnxDeviceRunner, device="cpu")])
def test_a_stage_whose_logits_are_never_finite_is_refused_at_the_start(bundle_path, make):
    """Its images would run every stage, for an answer without a confidence."""
    put_behind_logits(bundle_path, 3, "Mul", np.array(np.nan, np.float32))
    runner = make(load_bundle(bundle_path), max_rows=2, n_lanes=1)
    with pytest.raises(RunnerError, match="stage 3 gives logits that are not finite for a blank image"):
        runner.warm_up()


def test_serving_on_the_cpu_loads_no_torch(folder):
    program = (
        "import sys\n"
        "from models.bundle import load_bundle\n"
        "from service.assembly import build_engine\n"
        "bundle = load_bundle(sys.argv[1])\n"
        "engine = build_engine(bundle, bundle.costs_mflops[-1], n_lanes=1, device='cpu')\n"
        "engine.start(); assert engine.drain(5)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_name_that_the_runtime_rejects_is_reported(bundle_path: Path) -> None:
    renamed = bundle_path.rename(bundle_path.with_name(os.fsdecode(b"caf\xe9")))
    with pytest.raises(StageLoadError, match="whose name is not UTF-8; rename it"):
        OnnxRunner(load_bundle(renamed), max_rows=4)
