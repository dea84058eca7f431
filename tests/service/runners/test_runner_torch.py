"""The torch runner on the host, without graphs and streams: its answers are those of the trained network."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from models.bundle import Bundle, load_bundle
from models.exits import SCORES, confidence, take_exits
from models.normalise import Normalise
from models.registry import build_network
from models.scores import score_exits
from service.engine.engine import Engine
from service.engine.rows import Options
from service.errors import EngineUnsound
from service.runners.base import NO_LOGITS, RunnerError, StageOutput
from service.runners.blocks import Block, keep
from service.runners.onnx import OnnxRunner
from service.runners.slotted import Running
from service.runners.torch_cuda.device import Host
from service.runners.torch_cuda.joined import ConvRelu, by_cudnn
from service.runners.torch_cuda.kernels import Kernels
from service.runners.torch_cuda.network import cut, lower
from service.runners.torch_cuda.runner import TorchCudaRunner, open_torch_runner
from service.runners.torch_cuda.scoring import N_NUMBERS
from service.runners.torch_cuda.scoring import SCORES as DEVICE_SCORES
from tests.bundles import IMAGE_SIZE_PX, MEAN, REPOSITORY, STD, random_images, tiny_network
from tests.service.engine.test_engine import running
from tests.service.slotted import (
    MAX_ROWS,
    all_free,
    answer_all,
    close,
    engine_around,
    logits_of,
    regroup_at_random,
    run_side_by_side,
)
from tests.waiting import LIMIT_S, wait_until

SHAPE = (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)


@pytest.fixture(scope="module")
def runner(bundle: Bundle) -> TorchCudaRunner:
    runner = open_torch_runner(bundle, MAX_ROWS, 256, device=Host())
    runner.warm_up()
    return runner


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return random_images(200, seed=51)


@pytest.fixture(scope="module")
def whole(images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """The logits [200, classes] of every exit of the trained network, in float32."""
    with torch.no_grad():
        return [x.numpy() for x in tiny_network()(Normalise(MEAN, STD)(torch.from_numpy(images)))]


def tiny_ranet() -> nn.Module:
    arguments = {"config": "C-m1", "n_classes": 10, "n_channels": 4, "n_blocks": 1, "step": 1, "block_step": 1}
    arguments |= {"scales": [1, 2, 3], "growth_factors": [4, 2, 1], "bottleneck_factors": [4, 2, 1]}
    return build_network("ranet", arguments).eval()


# --- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_randomly_regrouped_rows_get_the_networks_answers(
    runner: TorchCudaRunner, images: NDArray[np.uint8], whole: list[NDArray[np.float32]], seed: int
) -> None:
    def check(stage: int, ids: Sequence[int], output: StageOutput) -> None:
        close(output.logits, whole[stage][ids])
        assert output.heads is not None
        np.testing.assert_array_equal(output.heads.classes, output.logits.argmax(axis=1))
        np.testing.assert_allclose(output.heads.confidences, confidence(output.logits), rtol=1e-12)
        np.testing.assert_allclose(output.heads.scores, SCORES["logit_margin"](output.logits), rtol=1e-12)

    regroup_at_random(runner, images, seed, check)


def test_in_one_bucket_a_row_is_bitwise_independent_of_the_others(
    runner: TorchCudaRunner, images: NDArray[np.uint8]
) -> None:
    alone = runner.run(0, [runner.first_state(image) for image in images[:MAX_ROWS]])
    others = runner.run(0, [runner.first_state(image) for image in [images[40], *images[1:9], *images[60:67]]])
    assert np.array_equal(alone.logits[1:9], others.logits[1:9])


def test_lanes_are_independent(
    runner: TorchCudaRunner, images: NDArray[np.uint8], whole: list[NDArray[np.float32]]
) -> None:
    run_side_by_side(runner, images, lambda stage, ids, output: close(output.logits, whole[stage][ids]))


def test_logits_are_copied_only_on_request_and_scores_always(
    runner: TorchCudaRunner, images: NDArray[np.uint8]
) -> None:
    rows = runner.first_states(images, range(5))
    first, without, again = (runner.launch(0, rows, None, wanted).collect() for wanted in (True, False, True))
    assert without.logits is NO_LOGITS
    assert len(first.logits) == 5
    np.testing.assert_array_equal(first.logits, again.logits)
    assert first.heads is not None
    assert without.heads is not None
    for name in ("classes", "scores", "confidences"):
        np.testing.assert_array_equal(getattr(without.heads, name), getattr(first.heads, name))


def test_a_score_computed_on_the_host_always_gets_the_logits(
    bundle: Bundle, images: NDArray[np.uint8], whole: list[NDArray[np.float32]]
) -> None:
    chosen = Bundle(bundle.path, bundle.manifest.model_copy(update={"score": "patience"}), bundle.calibration)
    runner = open_torch_runner(chosen, 8, 64, device=Host())
    runner.warm_up(0.0)
    output = runner.launch(0, runner.first_states(images, range(5)), None, False).collect()
    assert output.heads is None
    close(output.logits, whole[0][:5])


@pytest.mark.parametrize("score", ["logit_margin", "patience"])
def test_the_engine_gives_the_networks_answers_and_frees_every_slot(
    bundle: Bundle, images: NDArray[np.uint8], whole: list[NDArray[np.float32]], score: str
) -> None:
    """Two lanes, exits, regrouping, clients that leave, and wishes; with a score of the device's, and one of the host's
    that remembers earlier exits."""
    chosen = Bundle(bundle.path, bundle.manifest.model_copy(update={"score": score}), bundle.calibration)
    runner = open_torch_runner(chosen, 8, 256, device=Host())
    assert (runner.score is None) == (score == "patience")
    answer_all(runner, chosen, images, whole, 1e-4)


@contextmanager
def a_lane_that_hangs(bundle: Bundle, image: NDArray[np.uint8], label: int) -> Iterator[tuple[Engine, list[int]]]:
    """An engine whose first lane's first batch hangs until this ends, and where the number of its rows is noted.

    At the end the lane comes back, an image has its label, and every slot is free again.
    """
    runner = open_torch_runner(bundle, 4, 256, device=Host())
    engine, gate = engine_around(runner, bundle, hang_s=0.0), threading.Event()
    hung: list[int] = []

    def hanging(launch: Callable[..., Running], *batch: Any) -> Running:
        launched = launch(*batch)
        if hung:
            return launched
        hung.append(len(batch[2]))
        return Running(lambda: (gate.wait(LIMIT_S), launched.collect())[1], gate.is_set)

    with running(engine):
        lane = runner.lanes[0]
        lane.launch = partial(hanging, lane.launch)  # type: ignore[method-assign]
        yield engine, hung
        assert engine.stats().hung_batches == 1
        gate.set()
        wait_until("the lane is back", lambda: engine.ask(lambda: engine._loop.guard.lanes_left).result() == 2)
        assert engine.submit(image, Options(exit=4)).result(LIMIT_S).class_id == label
    wait_until("every slot is free", lambda: all_free(runner.slots))


def test_images_of_a_hanging_lane_and_behind_it_are_answered_by_the_other_lane(
    bundle: Bundle, images: NDArray[np.uint8], whole: list[NDArray[np.float32]]
) -> None:
    with a_lane_that_hangs(bundle, images[0], whole[3][0].argmax()) as (engine, hung):
        futures = [engine.submit(image, Options(exit=1 + i % 4)) for i, image in enumerate(images[:60])]
        for i, future in enumerate(futures):
            assert future.result(LIMIT_S).class_id == whole[i % 4][i].argmax()
        assert hung
        del futures, future


def test_a_single_hanging_image_does_not_stop_the_engine(
    bundle: Bundle, images: NDArray[np.uint8], whole: list[NDArray[np.float32]]
) -> None:
    with a_lane_that_hangs(bundle, images[0], whole[3][0].argmax()) as (engine, hung):
        first = engine.submit(images[0], Options(exit=2))
        wait_until("it runs", lambda: bool(hung))
        assert engine.stats().in_flight_rows == 1
        assert engine.submit(images[1], Options(exit=4)).result(LIMIT_S).class_id == whole[3][1].argmax()
        assert first.result(LIMIT_S).class_id == whole[1][0].argmax()  # once more, on the other lane
        assert hung == [1]
        del first


def test_with_all_lanes_hanging_images_fail_and_a_trial_recovers(
    bundle: Bundle, images: NDArray[np.uint8], whole: list[NDArray[np.float32]]
) -> None:
    runner = open_torch_runner(bundle, 4, 256, device=Host())
    engine, gate = engine_around(runner, bundle, hang_s=0.0), threading.Event()

    def hanging(launch: Callable[..., Running], *batch: Any) -> Running:
        launched = launch(*batch)
        return Running(launched.collect, lambda: gate.is_set() and launched.has_run())

    with running(engine):
        for lane in runner.lanes:
            lane.launch = partial(hanging, lane.launch)  # type: ignore[method-assign]
        futures = [engine.submit(image) for image in images[:30]]
        for future in futures:
            with pytest.raises(EngineUnsound, match="2 lanes hang"):
                future.result(LIMIT_S)
        with pytest.raises(EngineUnsound):
            engine.submit(images[0])
        assert engine.stats().in_flight_rows == 0  # it still answers
        gate.set()
        wait_until("a trial has run", lambda: engine.trouble is None)
        assert engine.submit(images[0], Options(exit=4)).result(LIMIT_S).class_id == whole[3][0].argmax()
        assert engine.stats().hung_batches == 2
        del futures, future
    wait_until("every slot is free", lambda: all_free(runner.slots))


def test_the_bundle_that_ships_gives_onnxs_answers() -> None:
    shipped = load_bundle(REPOSITORY / "models/zoo/cifar100-msdnet")
    onnx = OnnxRunner(shipped, 8, 1)
    torch_runner = open_torch_runner(shipped, 8, 8, device=Host())
    torch_runner.warm_up()
    pixels = random_images(8, seed=3)
    for ours, theirs in zip(logits_of(torch_runner, pixels), logits_of(onnx, pixels), strict=True):
        close(ours, theirs)


def test_half_precision_keeps_labels_and_exits(
    images: NDArray[np.uint8], whole: list[NDArray[np.float32]], bundle: Bundle
) -> None:
    runner = TorchCudaRunner(
        tiny_network(), SHAPE, MEAN, STD, "logit_margin", 64, device=Host(), dtype=torch.bfloat16, n_lanes=1
    )
    runner.warm_up()
    logits = logits_of(runner, images[:64])
    for ours, expected in zip(logits, whole, strict=True):
        assert ours.dtype == np.float32
        close(ours, expected[:64], tolerance=0.05)  # bf16 keeps 8 bits
    assert not np.array_equal(logits[0], whole[0][:64])  # the precision is really lower
    thresholds = bundle.frontier().at(0.5).thresholds
    exits = [
        take_exits(score_exits(bundle.score(), x), np.array(thresholds)) for x in (logits, [w[:64] for w in whole])
    ]
    assert (exits[0] == exits[1]).mean() > 0.9


def test_a_network_whose_maps_overflow_half_precision_is_refused() -> None:
    """It once silently answered from infinities, every image at the full cost."""
    network = tiny_network()
    last = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    with torch.no_grad():
        last.weight.mul_(1e6)
    options = {"max_rows": 2, "max_in_flight_rows": 2, "device": Host(), "n_lanes": 1}
    with pytest.raises(RunnerError, match=r"stage 4 gives logits .* float16, which ends at 65,504: choose the runner"):
        TorchCudaRunner(network, SHAPE, MEAN, STD, "logit_margin", dtype=torch.float16, **options)
    TorchCudaRunner(network, SHAPE, MEAN, STD, "logit_margin", dtype=torch.float32, **options)


def test_a_slot_is_held_only_by_its_row(runner: TorchCudaRunner, images: NDArray[np.uint8]) -> None:
    output = runner.run(0, [runner.first_state(image) for image in images[:MAX_ROWS]])
    assert runner.slots.n_free == runner.slots.n_slots - MAX_ROWS
    kept = keep(output.block, [3, 4, 9])
    del output
    assert runner.slots.n_free == runner.slots.n_slots - 3
    del kept[0]
    assert runner.slots.n_free == runner.slots.n_slots - 2
    del kept
    assert all_free(runner.slots)


# --- the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network",
    [tiny_network, tiny_ranet],
    ids=["msdnet", "ranet"],
)
def test_normalisation_is_folded_and_maps_are_channels_last(network: Callable[[], nn.Module]) -> None:
    made = network()
    pixels = torch.from_numpy(random_images(3, seed=9))
    with torch.inference_mode():
        whole = made(Normalise(MEAN, STD)(pixels))
        stages = lower(cut(made, SHAPE, MEAN, STD), torch.device("cpu"), torch.float32)
        state = {"images": pixels}
        for expected, stage in zip(whole, stages, strict=True):
            assert not any(isinstance(module, nn.BatchNorm2d) for module in stage.modules())
            outputs = stage(*(state[name] for name in stage.inputs))
            close(outputs[0].numpy(), expected.numpy())
            state.update(zip(stage.outputs, outputs, strict=True))
    maps = [value for name, value in state.items() if value.ndim == 4 and name != "images"]
    assert maps
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in maps)


def test_a_network_that_cannot_be_rebuilt_is_refused(bundle: Bundle) -> None:
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={"architecture": "onnx"}), bundle.calibration)
    with pytest.raises(RunnerError, match="choose the runner onnx, or auto"):
        open_torch_runner(other, 8, 8, device=Host())
    arguments = bundle.manifest.arguments | {"n_classes": 11}
    wrong = bundle.manifest.model_copy(update={"arguments": arguments})
    with pytest.raises(RunnerError, match="do not fit the network of the manifest"):
        open_torch_runner(Bundle(bundle.path, wrong, bundle.calibration), 8, 8, device=Host())
    fewer = bundle.manifest.model_copy(update={"class_names": bundle.manifest.class_names[:3]})
    with pytest.raises(RunnerError, match="it has 4 exits and 10 classes, the manifest other numbers"):
        open_torch_runner(Bundle(bundle.path, fewer, bundle.calibration), 8, 8, device=Host())


def test_without_a_gpu_it_fails_with_an_error(bundle: Bundle) -> None:
    with pytest.raises(RunnerError, match="sees no GPU: choose the runner onnx or auto"):
        open_torch_runner(bundle, 8, 8)


# --- scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("n_classes", [2, 10, 1000])
def test_scores_of_the_device_are_those_of_the_calibration(score: str, n_classes: int) -> None:
    rng = np.random.default_rng(7)
    scale = 10.0 ** rng.uniform(-3, 2.5, size=(300, 1))
    logits = (scale * rng.normal(size=(300, n_classes))).astype(np.float32)
    logits[0, 0], logits[1], logits[2, 1] = np.inf, np.nan, -np.inf
    logits[3] = 0.0
    judged = torch.empty((300, N_NUMBERS), dtype=torch.float64)
    Kernels().judge(torch.from_numpy(logits), score, judged)
    told = judged.numpy()
    finite = np.isfinite(logits).all(axis=1)
    np.testing.assert_array_equal(told[4:, 0], logits.argmax(axis=1)[4:])
    np.testing.assert_allclose(told[finite, 1], confidence(logits)[finite], rtol=1e-12)
    np.testing.assert_allclose(told[:, 2], SCORES[score](logits), rtol=1e-9, atol=1e-300)


def test_every_plain_score_has_a_device_version() -> None:
    assert set(DEVICE_SCORES) == set(SCORES)


@pytest.mark.parametrize("network", [tiny_network, tiny_ranet], ids=["msdnet", "ranet"])
def test_bias_and_relu_are_fused_after_every_convolution(network: Callable[[], nn.Module]) -> None:
    """With the test's kernel in place of the GPU's: its arguments, and what remains of the other operations."""
    joined = 0

    def bias_relu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        nonlocal joined
        joined += 1
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert bias.shape == (1, x.shape[1], 1, 1)
        return torch.relu(x + bias)

    made, cpu = network(), torch.device("cpu")
    pixels = torch.from_numpy(random_images(3, seed=9))
    with torch.inference_mode():
        whole = made(Normalise(MEAN, STD)(pixels))
        stages = lower(cut(made, SHAPE, MEAN, STD), cpu, torch.float32, bias_relu)
        state = {"images": pixels}
        n_convolutions = 0
        for expected, stage in zip(whole, stages, strict=True):
            assert not any(isinstance(module, nn.ReLU) for module in stage.modules())
            n_convolutions += sum(isinstance(module, nn.Conv2d) for module in stage.modules())
            outputs = stage(*(state[name] for name in stage.inputs))
            close(outputs[0].numpy(), expected.numpy())
            by_itself = by_cudnn(stage)  # whose kernel exists only on GPUs
            assert all(module.by_cudnn for module in by_itself.modules() if isinstance(module, ConvRelu))
            assert not any(module.by_cudnn for module in stage.modules() if isinstance(module, ConvRelu))
            state.update(zip(stage.outputs, outputs, strict=True))
    assert joined == n_convolutions > 0


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("many_bytes", "many_runs", "many_numbers"), [(1 << 20, 4, 0), (3_000, 4, 0), (3_000, 1, 0), (3_000, 1, 32_768)]
)
def test_storing_many_images_at_once_equals_one_by_one(
    runner: TorchCudaRunner,
    images: NDArray[np.uint8],
    order: Literal["C", "F"],
    many_bytes: int,
    many_runs: int,
    many_numbers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.runners.torch_cuda.runner.MANY_BYTES", many_bytes)
    monkeypatch.setattr("service.runners.torch_cuda.runner.MANY_RUNS", many_runs)
    monkeypatch.setattr("service.runners.torch_cuda.runner.MANY_NUMBERS", many_numbers)
    which = [7, 8, 1, 1, 50]
    for first in (0, runner.slots.n_slots - 2):  # the second time in two parts, as places go round a ring
        runner.slots._next_place = first
        states = runner.first_states(np.array(images, order=order), which)
        assert states[0].place == first
        for state, i in zip(states, which, strict=True):
            assert np.array_equal(runner.pictures[state.place], images[i])
        del state, states
    with pytest.raises(ValueError, match="but the network takes"):
        runner.first_states(images[:, 1:], which)


def test_an_image_of_another_shape_or_type_is_refused(runner: TorchCudaRunner) -> None:
    with pytest.raises(ValueError, match=r"but the network takes uint8 \(32, 32, 3\)"):
        runner.first_state(np.zeros((32, 31, 3), np.uint8))
    assert isinstance(runner.first_state(np.zeros(SHAPE, np.uint8)).block, Block)
