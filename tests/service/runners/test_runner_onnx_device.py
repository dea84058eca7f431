"""ONNX Runtime with state in slots, on the CPU: the same graphs, bindings and slot management as on a GPU."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle, load_bundle
from models.onnx_weights import StageLoadError, load_stage_session
from service.runners.base import FatalRunnerError, RunnerError, StageOutput
from service.runners.onnx import OnnxRunner
from service.runners.onnx_device import staging
from service.runners.onnx_device.graph import STORE_OPERATORS, with_slots
from service.runners.onnx_device.lane import OnnxLane, _OwnThread
from service.runners.onnx_device.runner import OnnxDeviceRunner
from service.runners.onnx_device.staging import Staging
from service.runners.providers import cuda_device_count
from service.runners.slots import SCRATCH, SlotState
from tests.bundles import REPOSITORY, random_images
from tests.service.slotted import MAX_ROWS, all_free, answer_all, logits_of, regroup_at_random, run_side_by_side
from tests.waiting import LIMIT_S


@pytest.fixture(scope="module")
def runner(bundle: Bundle) -> OnnxDeviceRunner:
    runner = OnnxDeviceRunner(bundle, "cpu", MAX_ROWS, 256)
    runner.warm_up()
    return runner


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return random_images(200, seed=51)


@pytest.fixture(scope="module")
def expected(bundle: Bundle, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """The logits [200, classes] of every exit, from the runner that keeps state in host memory."""
    return logits_of(OnnxRunner(bundle, 200, 1), images)


def test_logits_are_read_again_if_they_cannot_be_copied_to_a_fixed_buffer(
    bundle: Bundle, images: NDArray[np.uint8], expected: list[NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = ort.OrtValue.update_inplace

    def refuses(value: ort.OrtValue, data: Any) -> None:
        if isinstance(data, ort.OrtValue):
            raise RuntimeError("no way from this device")
        update(value, data)

    for patched in (False, True):
        if patched:
            monkeypatch.setattr(ort.OrtValue, "update_inplace", refuses)
        runner = OnnxDeviceRunner(bundle, "cpu", 32, 64, n_lanes=1)
        runner.warm_up()
        assert bool(runner.lanes[0]._on_host) == (not patched)
        for found, wanted in zip(logits_of(runner, images[:32]), expected, strict=True):
            np.testing.assert_array_equal(found, wanted[:32])


def test_memory_is_pinned_if_possible(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without a GPU: first with the test's own functions for pinning, then with this machine's, which has none."""

    def broken(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
        raise RuntimeError("no such allocator")

    def works(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
        return np.full(shape, 7, dtype)

    assert Staging("cpu").how is None
    assert not caplog.records
    with monkeypatch.context() as patched:
        patched.setattr(staging, "_ways", lambda: iter([("one", broken), ("another", works), ("third", broken)]))
        pinned = Staging("cuda")
        assert pinned.how == "another"
        np.testing.assert_array_equal(pinned.array((2, 3), "int64"), np.zeros((2, 3), np.int64))
    if cuda_device_count():
        assert Staging("cuda").how is not None
        return
    plain = Staging("cuda")
    assert plain.how is None
    assert "host memory is not pinned" in caplog.text
    np.testing.assert_array_equal(plain.array((2, 3), "uint8"), np.zeros((2, 3), np.uint8))


# --- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_randomly_regrouped_rows_get_bitwise_the_plain_runners_answers(
    runner: OnnxDeviceRunner, images: NDArray[np.uint8], expected: list[NDArray[np.float32]], seed: int
) -> None:
    def check(stage: int, ids: Sequence[int], output: StageOutput) -> None:
        assert np.array_equal(output.logits, expected[stage][ids])
        assert not output.block.values  # nothing but logits comes back

    regroup_at_random(runner, images, seed, check)


def test_lanes_are_independent(
    runner: OnnxDeviceRunner, images: NDArray[np.uint8], expected: list[NDArray[np.float32]]
) -> None:
    def check(stage: int, ids: Sequence[int], output: StageOutput) -> None:
        assert np.array_equal(output.logits, expected[stage][ids])

    run_side_by_side(runner, images, check)


def test_with_graphs_every_lane_has_its_own_thread(
    bundle: Bundle, images: NDArray[np.uint8], expected: list[NDArray[np.float32]]
) -> None:
    """ONNX Runtime keeps captured graphs by thread, so the capturing thread must replay them."""
    runner = OnnxDeviceRunner(bundle, "cpu", MAX_ROWS, 256)
    n_sessions, threads = runner.n_stages, {}
    sessions = [lane.sessions for lane in runner.lanes]
    runner.lanes[:] = [
        OnnxLane(  # type: ignore[misc]
            [Noting(one, threads) for one in of],
            runner.stages,
            runner.stores,
            "cpu",
            pictures=runner.pictures,
            own_thread=True,
        )
        for of in sessions
    ]
    while not runner._idle.empty():
        runner._idle.get()
    for lane in runner.lanes:
        runner._idle.put(lane)

    def check(stage: int, ids: Sequence[int], output: StageOutput) -> None:
        assert np.array_equal(output.logits, expected[stage][ids])

    runner.warm_up()
    run_side_by_side(runner, images, check)
    assert len(threads) == runner.n_lanes * n_sessions
    assert all(len(idents) == 1 for idents in threads.values())
    assert len(set.union(*threads.values())) == runner.n_lanes
    assert threading.get_ident() not in set.union(*threads.values())


HANGS = """
import threading
from service.runners.onnx_device.lane import _OwnThread

own, hangs = _OwnThread(), threading.Event()

def hang():
    hangs.set()
    threading.Event().wait()

threading.Thread(target=own.run, args=(hang,), daemon=True).start()
assert hangs.wait(60)
"""


def test_a_lane_that_hangs_on_its_own_thread_does_not_block_the_exit() -> None:
    """Python waits for the threads of a pool at exit."""
    subprocess.run([sys.executable, "-c", HANGS], check=True, timeout=LIMIT_S)


def test_a_lanes_thread_ends_with_it_and_keeps_nothing_alive() -> None:
    own = _OwnThread()
    thread = own.run(threading.current_thread)
    assert thread is not threading.current_thread()

    class Large:
        def fail(self) -> None:
            raise RuntimeError("out of memory")

    large = Large()
    gone = weakref.ref(large)
    gc.disable()  # what is in no circle goes at once: memory is tried for again right after
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            own.run(large.fail)
        del large
        own.run(threading.get_ident)
        assert gone() is None
    finally:
        gc.enable()
    del own
    thread.join(LIMIT_S)
    assert not thread.is_alive()


class Noting:
    """A session that records which threads run it."""

    def __init__(self, session: ort.InferenceSession, threads: dict[int, set[int]]) -> None:
        self._session, self._threads = session, threads

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self._threads.setdefault(id(self._session), set()).add(threading.get_ident())
        self._session.run_with_iobinding(binding, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def test_logits_belong_to_the_caller(runner: OnnxDeviceRunner, images: NDArray[np.uint8]) -> None:
    first = runner.run(0, [runner.first_state(images[0])]).logits
    before = first.copy()
    for image in images[1:4]:  # both lanes, the same buffers
        runner.run(0, [runner.first_state(image)])
    assert np.array_equal(first, before)


@pytest.mark.parametrize("name", ["cifar100-msdnet", "imagenette-msdnet"])
def test_the_bundles_that_ship_give_bitwise_the_plain_runners_answers(name: str) -> None:
    shipped = load_bundle(REPOSITORY / "models/zoo" / name)
    on_device = OnnxDeviceRunner(shipped, "cpu", 4, 4, 1)
    on_device.warm_up()
    pixels = np.random.default_rng(3).integers(0, 256, (3, *on_device.image_shape), dtype=np.uint8)
    plain = logits_of(OnnxRunner(shipped, 4, 1), pixels)
    for ours, theirs in zip(logits_of(on_device, pixels), plain, strict=True):
        assert np.array_equal(ours, theirs)


def test_the_engine_gives_the_networks_answers_and_frees_every_slot(
    bundle: Bundle, images: NDArray[np.uint8], expected: list[NDArray[np.float32]]
) -> None:
    answer_all(OnnxDeviceRunner(bundle, "cpu", 8, 256), bundle, images, expected, 1e-9)


# --- graphs and bindings ----------------------------------------------------------------------------------------


def test_a_stage_reads_and_writes_stores_and_returns_only_logits(bundle: Bundle) -> None:
    stage = bundle.manifest.stages[1]
    read_later = {value.name for later in bundle.manifest.stages[2:] for value in later.inputs}
    kept = {value.name for value in stage.inputs} | read_later
    path = bundle.path / "extended.onnx"  # beside the weights that it refers to
    path.write_bytes(with_slots(bundle.path / stage.file, stage, kept, 9))
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    written = {value.name for value in stage.outputs} & read_later
    assert written
    assert {one.name for one in model.graph.input} == {
        "exitserve.slots",
        *(f"exitserve.store.{name}" for name in {value.name for value in stage.inputs} | written),
    }
    assert next(one.name for one in model.graph.output) == stage.outputs[0].name
    assert {one.name for one in model.graph.output} - {stage.outputs[0].name} == {
        f"exitserve.stored.{name}" for name in written
    }
    added = [node for node in model.graph.node if any("exitserve." in name for name in (*node.input, *node.output))]
    assert {node.op_type for node in added} == set(STORE_OPERATORS)


def test_unread_values_are_not_stored_and_other_rows_are_unchanged(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    """Stores are bound as both input and output: what a batch does not write is bitwise unchanged."""
    runner = OnnxDeviceRunner(bundle, "cpu", 4, 8, 1)
    runner.warm_up()
    noise = {name: np.random.default_rng(1).random(value.shape()) for name, value in runner.stores.items()}
    for name, value in runner.stores.items():
        value.update_inplace(noise[name].astype(np.float32))
    output = runner.run(0, [runner.first_state(image) for image in images[:3]])
    slots = [cast(SlotState, row).slot for row in output.states]
    made = {value.name for value in runner.stages[0].outputs}
    for name, value in runner.stores.items():
        changed = (value.numpy() != noise[name].astype(np.float32)).reshape(len(noise[name]), -1).any(axis=1)
        assert set(np.flatnonzero(changed)) == ({*slots, SCRATCH} if name in made else set())


def test_stages_are_bound_per_bucket_and_batches_take_the_smallest_that_fits(
    bundle: Bundle, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[tuple[int, int]] = []
    ran: list[tuple[int, int]] = []
    prepare, launch = OnnxLane.prepare, OnnxLane.launch

    def preparing(self: OnnxLane, stage: int, bucket: int) -> None:
        prepared.append((stage, bucket))
        prepare(self, stage, bucket)

    def running(self: OnnxLane, stage: int, bucket: int, *rest: Any) -> Any:
        ran.append((stage, bucket))
        return launch(self, stage, bucket, *rest)

    monkeypatch.setattr(OnnxLane, "prepare", preparing)
    monkeypatch.setattr(OnnxLane, "launch", running)
    runner = OnnxDeviceRunner(bundle, "cpu", 8, 8, 1)
    times = runner.warm_up()
    assert prepared == [(stage, bucket) for bucket in (8, 4, 2, 1) for stage in range(4)]
    assert [sorted(by_rows) for by_rows in times] == [[1, 2, 4, 8]] * 4
    ran.clear()
    for n_rows in (1, 2, 3, 5, 8):
        runner.run(0, [runner.first_state(image) for image in images[:n_rows]])
    assert ran == [(0, 1), (0, 2), (0, 4), (0, 8), (0, 8)]


# --- failures ---------------------------------------------------------------------------------------------------


def test_with_little_memory_batches_get_smaller_with_a_warning(
    bundle: Bundle, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prepare = OnnxLane.prepare
    said = "Failed to allocate memory for requested buffer of size 4096"

    def preparing(self: OnnxLane, stage: int, bucket: int) -> None:
        if bucket > 3:
            raise RuntimeError(said)
        prepare(self, stage, bucket)

    monkeypatch.setattr(OnnxLane, "prepare", preparing)
    runner = OnnxDeviceRunner(bundle, "cpu", 8, 64)
    runner.warm_up()
    assert runner.max_rows == 2
    assert [record.message for record in caplog.records if record.name.endswith("slotted")] == [
        f"too little memory for 8 images at once; now at most 4: {said}",
        f"too little memory for 4 images at once; now at most 2: {said}",
    ]
    assert runner.run(0, [runner.first_state(image) for image in images[:2]]).block.n_rows == 2


@pytest.mark.parametrize(
    ("error", "kept"), [("Failed to allocate memory for requested buffer of size 4096", True), ("no graphs", False)]
)
def test_graphs_are_given_up_if_refused_but_not_for_want_of_memory(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: str, kept: bool
) -> None:
    """Without memory, smaller batches are tried, still with graphs."""
    made = OnnxDeviceRunner(bundle, "cpu", 4, 8, 1)
    made.cuda_graphs = True

    def refusing(*stage: Any) -> ort.InferenceSession:
        if made.cuda_graphs:
            raise StageLoadError(error)
        return load_stage_session(*stage)

    monkeypatch.setattr("service.runners.onnx_device.runner.load_stage_session", refusing)
    if kept:
        with pytest.raises(StageLoadError, match=error):
            made._open_sessions()
    else:
        assert len(made._open_sessions()) == made.n_stages
    assert made.cuda_graphs == kept


class Breaking:
    """A session that raises ONNX Runtime's error for a failing kernel."""

    def __init__(self, session: ort.InferenceSession, error: str) -> None:
        self.session, self.error = session, error

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        raise RuntimeError(self.error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", RunnerError),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", FatalRunnerError),
    ],
)
def test_an_error_fails_one_batch_unless_the_device_is_lost(
    bundle: Bundle, images: NDArray[np.uint8], error: str, kind: type[RunnerError]
) -> None:
    runner = OnnxDeviceRunner(bundle, "cpu", 4, 8, 1)
    runner.warm_up()
    lane, row = runner.lanes[0], [runner.first_state(images[0])]
    sessions = lane.sessions
    lane.sessions = [Breaking(sessions[0], error), *sessions[1:]]  # type: ignore[list-item]
    with pytest.raises(RunnerError, match="stage 1 failed on a batch of 1: CUDA failure") as told:
        runner.run(0, row)
    assert type(told.value) is kind
    lane.sessions = sessions
    assert runner.run(0, row).block.n_rows == 1  # the lane was given back
    del told, row
    assert all_free(runner.slots)


def test_too_many_images_for_a_store_are_refused(bundle: Bundle) -> None:
    with pytest.raises(RunnerError, match="are too many for a store: lower --max-in-flight"):
        OnnxDeviceRunner(bundle, "cpu", 8, 10**6)


def test_a_later_stage_that_reads_images_is_refused(bundle: Bundle) -> None:
    first, second, *rest = bundle.manifest.stages
    second = second.model_copy(update={"inputs": [*second.inputs, first.inputs[0]]})
    manifest = bundle.manifest.model_copy(update={"stages": [first, second, *rest]})
    with pytest.raises(RunnerError, match="a later stage reads the images"):
        OnnxDeviceRunner(Bundle(bundle.path, manifest, bundle.calibration), "cpu", 8, 8)
