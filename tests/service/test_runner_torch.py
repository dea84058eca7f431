"""The torch runner on the host: the programs, slots and books of the GPU engine, without its graphs and streams."""

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from models.bundle import Bundle, load_bundle
from models.exits import SCORES, confidence, take_exits
from models.normalise import Normalise
from models.registry import build_network
from models.scores import plain_scores, score_exits
from service.budget import BudgetController
from service.engine import Engine
from service.rows import Answer, Options
from service.runners.base import Block, FatalRunnerError, RowState, RunnerError, keep
from service.runners.onnx import OnnxRunner
from service.runners.slots import SCRATCH, Slots, buckets_for
from service.runners.torch_cuda.device import Host, HostStream, Program, Stream
from service.runners.torch_cuda.memory import Values
from service.runners.torch_cuda.network import cut, lower
from service.runners.torch_cuda.resize import cut as cut_of
from service.runners.torch_cuda.resize import resize
from service.runners.torch_cuda.runner import TorchCudaRunner, open_torch_runner
from service.runners.torch_cuda.scoring import SCORES as DEVICE_SCORES
from service.runners.torch_cuda.scoring import judge
from service.scheduler import Scheduler
from tests.bundles import IMAGE_SIZE_PX, MEAN, REPOSITORY, STD, random_images, tiny_bundle, tiny_network
from tests.service.test_engine import balanced, running

MAX_ROWS = 16
SHAPE = (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


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
    """The logits [200, classes] of every exit: the network as it was trained, in float32."""
    with torch.no_grad():
        return [x.numpy() for x in tiny_network()(Normalise(MEAN, STD)(torch.from_numpy(images)))]


def tiny_ranet() -> nn.Module:
    arguments = {"config": "C-m1", "n_classes": 10, "n_channels": 4, "n_blocks": 1, "step": 1, "block_step": 1}
    arguments |= {"scales": [1, 2, 3], "growth_factors": [4, 2, 1], "bottleneck_factors": [4, 2, 1]}
    return build_network("ranet", arguments).eval()


def close(found: NDArray[Any], expected: NDArray[Any], tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))


def all_free(slots: Slots) -> bool:
    gc.collect()
    return slots.n_free == slots.n_slots


# --- slots ------------------------------------------------------------------------------------------------------


def test_a_million_rows_are_regrouped_and_none_is_lost_doubled_or_swapped() -> None:
    """Rows start, go on in batches of any others, and leave at random; every one finds its own values, once a stage."""
    n_images, n_stages, n_slots = 1_000_000, 4, 20_000
    rng = np.random.default_rng(0)
    slots = Slots(n_slots)
    made_by = {f"made by {k}": torch.zeros((2, 1), dtype=torch.int64) for k in range(n_stages)}
    values = Values(made_by | {"map": torch.zeros((2, 2, 3, 1), dtype=torch.int32)}, n_slots)
    nobody = (np.zeros(0, np.int64), np.zeros(0, object))
    waiting = [nobody] * n_stages  # images and their slots, before every stage but the first
    passed = np.zeros((n_stages, n_images), np.int8)
    n_started = n_ended = 0
    while n_ended < n_images:
        room = min(slots.n_free, n_images - n_started)
        ready = [stage for stage in range(1, n_stages) if len(waiting[stage][0])] + [0] * (room > 0)
        stage, size = int(rng.choice(ready)), int(rng.integers(1, 8000))
        if stage == 0:
            size = min(size, room)
            ids, held = np.arange(n_started, n_started + size), np.array(slots.take(size), object)
            n_started += size
        else:
            order = rng.permutation(len(waiting[stage][0]))
            ids, held = (column[order[:size]] for column in waiting[stage])
            waiting[stage] = (waiting[stage][0][order[size:]], waiting[stage][1][order[size:]])
        indices = torch.tensor([slot.index for slot in held] + [SCRATCH] * 3)
        images = torch.from_numpy(np.append(ids, [-1] * 3))
        names = [*(f"made by {k}" for k in range(stage)), *(["map"] if stage else [])]
        for earlier, found in enumerate(values.gather(names, indices)):
            if found.ndim == 2:
                assert torch.equal(found[:-3, 0], images[:-3] * 10 + earlier)
            else:
                assert torch.equal(found[:-3, 1, 2, 0], images[:-3].int())
        making = {f"made by {stage}": images[:, None] * 10 + stage}
        if stage == 0:
            making["map"] = images.int()[:, None, None, None].expand(-1, 2, 3, 1)
        values.scatter(making, indices)
        passed[stage, ids] += 1
        stays = rng.random(len(ids)) < (0.6 if stage + 1 < n_stages else 0.0)
        n_ended += int((~stays).sum())
        if stage + 1 < n_stages:
            columns = zip(waiting[stage + 1], (ids[stays], held[stays]), strict=True)
            waiting[stage + 1] = tuple(np.concatenate(pair) for pair in columns)
        del held
    assert (passed[0] == 1).all()
    assert (passed <= 1).all()
    assert (np.diff(passed, axis=0) <= 0).all()
    del waiting
    assert all_free(slots)


def test_too_few_slots_are_told_and_none_is_lost() -> None:
    slots = Slots(5)
    held = slots.take(3)
    assert SCRATCH not in {slot.index for slot in held}
    with pytest.raises(RunnerError, match="3 images start, and fewer of the 5 slots"):
        slots.take(3)
    assert len({slot.index for slot in [*held, *slots.take(2)]}) == 5
    del held
    assert all_free(slots)


def test_a_slot_is_held_by_its_own_row_alone(runner: TorchCudaRunner, images: NDArray[np.uint8]) -> None:
    output = runner.run(0, [runner.first_state(image) for image in images[:MAX_ROWS]])
    assert runner.slots.n_free == runner.slots.n_slots - MAX_ROWS
    kept = keep(output.block, [3, 4, 9])
    del output
    assert runner.slots.n_free == runner.slots.n_slots - 3
    del kept[0]
    assert runner.slots.n_free == runner.slots.n_slots - 2
    del kept
    assert all_free(runner.slots)


# --- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_rows_regrouped_at_random_get_the_networks_own_answers(
    runner: TorchCudaRunner, images: NDArray[np.uint8], whole: list[NDArray[np.float32]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    waiting = [(i, runner.first_state(image)) for i, image in enumerate(images)]
    for stage in range(runner.n_stages):
        survivors: list[tuple[int, RowState]] = []
        order = rng.permutation(len(waiting)) if seed % 2 else np.arange(len(waiting))
        while len(order):
            size = int(rng.integers(1, MAX_ROWS + 1))
            batch, order = [waiting[j] for j in order[:size]], order[size:]
            output = runner.run(stage, [row for _, row in batch])
            ids = [i for i, _ in batch]
            close(output.logits, whole[stage][ids])
            assert output.heads is not None
            np.testing.assert_array_equal(output.heads.classes, output.logits.argmax(axis=1))
            np.testing.assert_allclose(output.heads.confidences, confidence(output.logits), rtol=1e-12)
            np.testing.assert_allclose(output.heads.scores, SCORES["logit_margin"](output.logits), rtol=1e-12)
            kept = [j for j in range(len(batch)) if rng.random() < 0.8]
            survivors += [(ids[j], state) for j, state in zip(kept, keep(output.block, kept), strict=True)]
        waiting = survivors


def test_in_one_bucket_a_row_is_the_same_to_the_bit_whoever_is_beside_it(
    runner: TorchCudaRunner, images: NDArray[np.uint8]
) -> None:
    alone = runner.run(0, [runner.first_state(image) for image in images[:MAX_ROWS]])
    others = runner.run(0, [runner.first_state(image) for image in [images[40], *images[1:9], *images[60:67]]])
    assert np.array_equal(alone.logits[1:9], others.logits[1:9])


def test_lanes_do_not_disturb_each_other(
    runner: TorchCudaRunner, images: NDArray[np.uint8], whole: list[NDArray[np.float32]]
) -> None:
    def through(part: int) -> None:
        rows: Sequence[RowState] = [runner.first_state(image) for image in images[part::13]]
        for stage in range(runner.n_stages):
            first, rest = runner.run(stage, rows[:5]), runner.run(stage, rows[5:])
            close(np.concatenate([first.logits, rest.logits]), whole[stage][part::13])
            rows = [*first.states, *rest.states]

    with ThreadPoolExecutor(3) as threads:  # one more than lanes
        list(threads.map(through, [*range(13)] * 2))
    assert all_free(runner.slots)


@pytest.mark.parametrize("score", ["logit_margin", "patience"])
def test_the_engine_answers_as_the_network_does_and_frees_every_slot(
    bundle: Bundle, images: NDArray[np.uint8], whole: list[NDArray[np.float32]], score: str
) -> None:
    """Two lanes, exits, regrouping, clients that leave, and wishes; with a score of the device's, and one of the host's
    that remembers earlier exits."""
    told = bundle.manifest.model_copy(update={"score": score})
    runner = open_torch_runner(Bundle(bundle.path, told, bundle.calibration), 8, 256, device=Host())
    assert (runner.score is None) == (score == "patience")
    budget = BudgetController(bundle.frontier(score), bundle.costs_mflops, 0.6 * bundle.costs_mflops[-1], 1000)
    scores = plain_scores(runner.n_stages)[score]
    scheduler: Scheduler[Any] = Scheduler(runner.n_stages, 8)
    engine = Engine(runner, budget, scheduler, scores, bundle.manifest.class_names)
    with running(engine):
        futures = [engine.submit(image, Options(top_k=1 + i % 3)) for i, image in enumerate(images)]
        pinned = engine.submit(images[0], Options(exit=3, steps=True, top_k=10))
        for future in futures[5::20]:
            future.cancel()
        left = set()
        for i, future in enumerate(futures):
            if future.cancelled():
                continue
            answer = future.result(60)
            assert isinstance(answer, Answer)
            logits = whole[answer.exit - 1][i]
            assert answer.class_id == logits.argmax()
            assert answer.confidence == pytest.approx(float(confidence(logits[None])[0]), abs=1e-4)
            assert [class_id for class_id, _ in answer.top_k] == np.argsort(-logits)[: 1 + i % 3].tolist()
            left.add(answer.exit)
        assert pinned.result(60).exit == 3
        assert len(left) > 1
        stats = engine.stats()
    assert balanced(stats)
    del futures, future, pinned
    assert runner.slots.n_free >= runner.slots.n_slots - 2 * 2 * 8  # what idle lanes still remember of their last batch


def test_the_bundle_that_ships_answers_as_with_onnx() -> None:
    shipped = load_bundle(REPOSITORY / "models/zoo/cifar100-msdnet")
    onnx = OnnxRunner(shipped, 8, 1, "cpu")
    torch_runner = open_torch_runner(shipped, 8, 8, device=Host())
    torch_runner.warm_up()
    pixels = random_images(8, seed=3)
    ours: Sequence[RowState] = [torch_runner.first_state(image) for image in pixels]
    theirs: Sequence[RowState] = [onnx.first_state(image) for image in pixels]
    for stage in range(onnx.n_stages):
        our_output, their_output = torch_runner.run(stage, ours), onnx.run(stage, theirs)
        close(our_output.logits, their_output.logits)
        ours, theirs = our_output.states, their_output.states


def test_in_half_precision_labels_and_exits_stay(
    images: NDArray[np.uint8], whole: list[NDArray[np.float32]], bundle: Bundle
) -> None:
    runner = TorchCudaRunner(
        tiny_network(), SHAPE, MEAN, STD, "logit_margin", 64, device=Host(), dtype=torch.bfloat16, n_lanes=1
    )
    runner.warm_up()
    rows: Sequence[RowState] = [runner.first_state(image) for image in images[:64]]
    logits = []
    for stage in range(runner.n_stages):
        output = runner.run(stage, rows)
        logits.append(output.logits)
        assert output.logits.dtype == np.float32
        close(output.logits, whole[stage][:64], tolerance=0.05)  # bf16 keeps 8 bits
        rows = output.states
    assert not np.array_equal(logits[0], whole[0][:64])  # it really is narrower
    thresholds = bundle.frontier().at(0.5).thresholds
    exits = [
        take_exits(score_exits(bundle.score(), x), np.array(thresholds)) for x in (logits, [w[:64] for w in whole])
    ]
    assert (exits[0] == exits[1]).mean() > 0.9


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


def test_what_cannot_be_rebuilt_is_told(bundle: Bundle) -> None:
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={"architecture": "onnx"}), bundle.calibration)
    with pytest.raises(RunnerError, match="choose the runner onnx, or auto"):
        open_torch_runner(other, 8, 8, device=Host())
    arguments = bundle.manifest.arguments | {"n_classes": 11}
    wrong = bundle.manifest.model_copy(update={"arguments": arguments})
    with pytest.raises(RunnerError, match="do not fit the network of the manifest"):
        open_torch_runner(Bundle(bundle.path, wrong, bundle.calibration), 8, 8, device=Host())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(bundle: Bundle) -> None:
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
    told = judge(torch.from_numpy(logits), score).numpy()
    finite = np.isfinite(logits).all(axis=1)
    np.testing.assert_array_equal(told[4:, 0], logits.argmax(axis=1)[4:])
    np.testing.assert_allclose(told[finite, 1], confidence(logits)[finite], rtol=1e-12)
    np.testing.assert_allclose(told[:, 2], SCORES[score](logits), rtol=1e-9, atol=1e-300)


def test_every_plain_score_has_its_twin() -> None:
    assert set(DEVICE_SCORES) == set(SCORES)


# --- buckets, memory, failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_rows", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (24, [1, 2, 4, 8, 16, 24])])
def test_buckets_are_powers_of_two_and_the_largest_batch(max_rows: int, expected: list[int]) -> None:
    assert buckets_for(max_rows) == expected


class BooksStream(HostStream):
    """The host's stream, which keeps a list of what was prepared and may run out of memory."""

    def __init__(self, device: "BooksHost") -> None:
        self._device = device

    def prepare(self, program: Program) -> Program:
        stage, bucket, _ = program.args  # type: ignore[attr-defined]
        if bucket > self._device.room_rows:
            raise self._device.no_memory
        self._device.prepared.append((stage, bucket))
        prepared = super().prepare(program)

        def run() -> None:
            if self._device.error is not None:
                raise self._device.error
            self._device.ran.append((stage, bucket))
            prepared()

        return run


class BooksHost(Host):
    def __init__(self, room_rows: int = 1000) -> None:
        self.room_rows = room_rows
        self.prepared: list[tuple[int, int]] = []
        self.ran: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.lost = False
        self.no_memory: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def open_stream(self) -> Stream:
        return BooksStream(self)

    def is_lost(self) -> bool:
        return self.lost


def test_every_stage_is_prepared_once_a_bucket_largest_first_and_the_smallest_that_fits_runs(
    bundle: Bundle, images: NDArray[np.uint8]
) -> None:
    device = BooksHost()
    runner = open_torch_runner(bundle, 8, 8, n_lanes=1, device=device)
    times = runner.warm_up()
    assert device.prepared == [(stage, bucket) for bucket in (8, 4, 2, 1) for stage in range(4)]
    assert [sorted(by_rows) for by_rows in times] == [[1, 2, 4, 8]] * 4
    device.ran.clear()
    runner.warm_up(0.0)  # a trial prepares nothing
    assert len(device.prepared) == 16
    assert {bucket for _, bucket in device.ran} == {1}
    device.ran.clear()
    for n_rows in (1, 2, 3, 5, 8):
        runner.run(0, [runner.first_state(image) for image in images[:n_rows]])
    assert device.ran == [(0, 1), (0, 2), (0, 4), (0, 8), (0, 8)]


def test_where_memory_ends_batches_get_smaller_with_a_warning(
    bundle: Bundle, images: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    runner = open_torch_runner(bundle, 8, 64, device=BooksHost(room_rows=3))
    budget = BudgetController(bundle.frontier(), bundle.costs_mflops, bundle.costs_mflops[-1], 1000)
    scheduler: Scheduler[Any] = Scheduler(runner.n_stages, 8)
    engine = Engine(runner, budget, scheduler, bundle.score(), bundle.manifest.class_names)
    with running(engine):
        assert runner.max_rows == engine.max_rows == 2
        assert [record.message for record in caplog.records if record.name.endswith("slotted")] == [
            "no memory for 8 images at once, at most 4 run together: CUDA out of memory",
            "no memory for 4 images at once, at most 2 run together: CUDA out of memory",
        ]
        answers = [future.result(60) for future in [engine.submit(image) for image in images[:40]]]
        assert max(answer.batch_rows for answer in answers) <= 2
    with pytest.raises(RunnerError, match="no memory for single images"):
        open_torch_runner(bundle, 8, 64, device=BooksHost(room_rows=0)).warm_up()


@pytest.mark.parametrize(
    ("error", "max_rows"),
    [
        (RuntimeError("CUDA error: out of memory"), 2),
        (RuntimeError("CUDA error: operation failed due to a previous error during capture"), 2),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), None),
    ],
)
def test_no_memory_is_understood_however_it_is_said(bundle: Bundle, error: Exception, max_rows: int | None) -> None:
    device = BooksHost(room_rows=2)
    device.no_memory = error
    runner = open_torch_runner(bundle, 4, 8, device=device)
    if max_rows is None:
        with pytest.raises(RunnerError, match="the stages cannot be prepared: CUDA error: operation not permitted"):
            runner.warm_up()
    else:
        runner.warm_up()
        assert runner.max_rows == max_rows


def test_an_error_is_one_batchs_own_unless_the_device_is_lost(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    device = BooksHost()
    runner = open_torch_runner(bundle, 4, 8, device=device)
    runner.warm_up()
    row = [runner.first_state(images[0])]
    device.error = RuntimeError("CUDA error: invalid argument")
    with pytest.raises(RunnerError, match="stage 1 failed on a batch of 1: CUDA error") as told:
        runner.run(0, row)
    assert not isinstance(told.value, FatalRunnerError)
    device.error, device.lost = RuntimeError("CUDA error: an illegal memory access was encountered"), True
    with pytest.raises(FatalRunnerError, match="illegal memory access"):
        runner.run(0, row)
    device.error = None
    assert runner.run(0, row).block.n_rows == 1  # the lane was given back each time
    del told
    assert all_free(runner.slots)


# --- pictures of other sizes ------------------------------------------------------------------------------------

SIDES = [(32, 32), (64, 64), (48, 64), (20, 61), (33, 32), (64, 1), (7, 5)]


def picture(height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(height).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def scaled(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """As Pillow does it, cut around the centre."""
    (top, down, height), (left, across, width) = cut_of(image.height, image.width, (side, side))
    box = (max(left, 0.0), max(top, 0.0), min(left + across * side, width), min(top + down * side, height))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box))


@pytest.mark.parametrize(
    ("dtype", "off_by_one", "worst"), [(torch.float64, 0.001, 1), (torch.float32, 0.05, 2), (torch.float16, 0.2, 2)]
)
def test_pictures_are_resized_as_pillow_does(dtype: torch.dtype, off_by_one: float, worst: int) -> None:
    side, canvases, cuts, expected = 24, np.full((len(SIDES), 64, 64, 3), 255, np.uint8), [], []
    for canvas, (height, width) in zip(canvases, SIDES, strict=True):
        image = picture(height, width)
        canvas[:height, :width] = np.asarray(image)
        cuts.append(cut_of(height, width, (side, side)))
        expected.append(scaled(image, side))
    found = resize(torch.from_numpy(canvases), torch.tensor(cuts, dtype=torch.float64), (side, side), dtype).numpy()
    off = np.abs(found.astype(int) - np.stack(expected).astype(int))
    assert off.max() <= worst
    assert (off > 0).mean() < off_by_one


def test_pictures_of_other_sizes_cross_as_they_are_and_answer_as_those_resized_before() -> None:
    runner = TorchCudaRunner(
        tiny_network(), SHAPE, MEAN, STD, None, 8, 16, device=Host(), dtype=torch.float32, canvas_px=64
    )
    runner.warm_up()
    pictures = [picture(*sides) for sides in SIDES]
    given = [np.asarray(image) for image in pictures]
    resized = [scaled(image, 32) for image in pictures]
    mixed: Sequence[RowState] = [runner.first_state(image) for image in given]
    before: Sequence[RowState] = [runner.first_state(image) for image in resized]
    for stage in range(runner.n_stages):
        ours, theirs = runner.run(stage, mixed), runner.run(stage, before)
        close(ours.logits, theirs.logits, tolerance=0.05)
        np.testing.assert_array_equal(ours.logits.argmax(axis=1), theirs.logits.argmax(axis=1))
        close(ours.logits[:1], theirs.logits[:1], tolerance=1e-6)  # of the network's own size: not touched
        mixed, before = ours.states, theirs.states
    for wrong in (np.zeros((65, 64, 3), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((0, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match="where the network takes uint8"):
            runner.first_state(wrong)


class Slow:
    """A stage that takes its time; how often it was called."""

    def __init__(self, stage: Any, seconds: float) -> None:
        self.stage, self.seconds, self.calls = stage, seconds, 0
        self.inputs, self.outputs = stage.inputs, stage.outputs

    def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        sleep(self.seconds)
        outputs: tuple[torch.Tensor, ...] = self.stage(*values)
        return outputs


def test_a_compiled_stage_is_taken_where_it_measures_faster_in_full_batches_alone(
    images: NDArray[np.uint8], whole: list[NDArray[np.float32]], caplog: pytest.LogCaptureFixture
) -> None:
    """Stages as they are take 20 ms longer here: of the compiled ones one fails, one is slower, and two are taken."""
    made: list[Slow] = []

    def compiler(stage: Any) -> Slow:
        made.append(Slow(stage.stage, 0.2 if len(made) == 2 else 0.0))
        if len(made) == 2:
            raise RuntimeError("no C compiler was found")
        return made[-1]

    runner = TorchCudaRunner(
        tiny_network(), SHAPE, MEAN, STD, None, 4, 16, device=Host(), dtype=torch.float32, compiler=compiler
    )
    runner.stages[:] = [Slow(stage, 0.02) for stage in runner.stages]  # type: ignore[misc]
    with caplog.at_level("INFO"):
        runner.warm_up(0.0)
    assert sorted(runner.compiled) == [0, 3]
    assert "stage 2 stays as it is, it cannot be compiled: no C compiler was found" in caplog.messages
    assert [message.rsplit(": ")[-1] for message in caplog.messages if " compiled takes " in message] == [
        "taken",
        "left",
        "taken",
    ]
    taken = [made[0], made[3]]
    for call in taken:
        call.calls = 0
    for n_rows in (4, 3, 2, 1):
        rows: Sequence[RowState] = [runner.first_state(image) for image in images[:n_rows]]
        for stage in range(runner.n_stages):
            output = runner.run(stage, rows)
            close(output.logits, whole[stage][:n_rows])
            rows = output.states
    assert [call.calls for call in taken] == [2, 2]  # of 4 and of 3 images, which run as 4


def test_an_image_of_another_kind_is_refused(runner: TorchCudaRunner) -> None:
    with pytest.raises(ValueError, match=r"where the network takes uint8 \(32, 32, 3\)"):
        runner.first_state(np.zeros((32, 31, 3), np.uint8))
    assert isinstance(runner.first_state(np.zeros(SHAPE, np.uint8)).block, Block)
