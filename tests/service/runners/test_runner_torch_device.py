"""The torch runner's calls to its device, and its handling of device errors, with a recorder in place of a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from math import inf
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.bundle import Bundle
from service.runners.base import FatalRunnerError, RunnerError
from service.runners.slotted import SWITCH_S
from service.runners.torch_cuda.cuda_calls import CudaCalls
from service.runners.torch_cuda.device import WARM_RUNS, Cuda, Host, HostStream, Mark, Program, Stream, has_room
from service.runners.torch_cuda.runner import open_torch_runner
from tests.bundles import random_images
from tests.service.engine.test_engine import running
from tests.service.slotted import TOO_LITTLE_FOR_ANY, TOO_LITTLE_MEMORY, all_free, engine_around


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return random_images(200, seed=51)


class BooksStream(HostStream):
    """The host's stream, which records prepared programs and may run out of memory."""

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

    def mark(self) -> Mark:
        return HostStream()  # passed as soon as it is recorded

    def query(self) -> bool:
        return not self._device.busy

    def wait(self) -> None:
        self._device.waits += 1


class BooksHost(Host):
    def __init__(self, room_rows: int = 1000) -> None:
        self.room_rows = room_rows
        self.prepared: list[tuple[int, int]] = []
        self.ran: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.lost = self.busy = False
        self.waits = 0
        self.no_memory: Exception = torch.OutOfMemoryError("CUDA out of memory\nCompile with\n")

    def open_stream(self) -> Stream:
        return BooksStream(self)

    def is_lost(self) -> bool:
        return self.lost


def test_stages_are_prepared_per_bucket_largest_first_and_the_smallest_that_fits_runs(
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


def test_with_gpu_lanes_the_interpreters_switch_interval_is_short(bundle: Bundle) -> None:
    before = sys.getswitchinterval()
    try:
        runner = open_torch_runner(bundle, 2, 8, device=BooksHost())
        assert not runner.is_on_gpu
        runner.warm_up()
        assert sys.getswitchinterval() == before
        runner = open_torch_runner(bundle, 2, 8, device=BooksHost())
        runner.is_on_gpu = True
        runner.warm_up()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        sys.setswitchinterval(SWITCH_S / 2)  # a shorter one is left as it is
        runner = open_torch_runner(bundle, 2, 8, device=BooksHost())
        runner.is_on_gpu = True
        runner.warm_up()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S / 2)
    finally:
        sys.setswitchinterval(before)


def test_with_little_memory_batches_get_smaller_with_a_warning(
    bundle: Bundle, images: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    runner = open_torch_runner(bundle, 8, 64, device=BooksHost(room_rows=3))
    engine = engine_around(runner, bundle)
    with running(engine):
        assert runner.max_rows == engine.max_rows == 2
        assert [record.message for record in caplog.records if record.name.endswith("slotted")] == [
            f"{TOO_LITTLE_MEMORY.format(8)}; now at most 4: CUDA out of memory",
            f"{TOO_LITTLE_MEMORY.format(4)}; now at most 2: CUDA out of memory",
        ]
        answers = [future.result(60) for future in [engine.submit(image) for image in images[:40]]]
        assert max(answer.batch_rows for answer in answers) <= 2
    with pytest.raises(RunnerError, match=TOO_LITTLE_FOR_ANY):
        open_torch_runner(bundle, 8, 64, device=BooksHost(room_rows=0)).warm_up()


@pytest.mark.parametrize(
    ("error", "max_rows"),
    [
        (RuntimeError("CUDA error: out of memory"), 2),
        (RuntimeError("CUDA error: operation failed due to a previous error during capture"), 2),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 2),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), None),
    ],
)
def test_all_out_of_memory_errors_are_recognised(bundle: Bundle, error: Exception, max_rows: int | None) -> None:
    device = BooksHost(room_rows=2)
    device.no_memory = error
    runner = open_torch_runner(bundle, 4, 8, device=device)
    if max_rows is None:
        with pytest.raises(RunnerError, match="the stages cannot be prepared: CUDA error: operation not permitted"):
            runner.warm_up()
    else:
        runner.warm_up()
        assert runner.max_rows == max_rows


def test_memory_that_runs_out_while_another_error_is_handled_is_recognised(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when torch, out of memory within a capture, ends the capture, which fails in turn."""
    device = BooksHost()
    prepare = BooksStream.prepare

    def ending(self: BooksStream, program: Program) -> Program:
        try:
            return prepare(self, program)
        except torch.OutOfMemoryError:
            raise RuntimeError("CUDA error: operation failed") from None

    monkeypatch.setattr(BooksStream, "prepare", ending)
    device.room_rows = 2
    runner = open_torch_runner(bundle, 4, 8, device=device)
    runner.warm_up()
    assert runner.max_rows == 2


@pytest.mark.parametrize("lost", [False, True])
def test_a_device_that_is_lost_during_warm_up_ends_the_engine(bundle: Bundle, lost: bool) -> None:
    device = BooksHost(room_rows=0)
    device.no_memory, device.lost = RuntimeError("CUDA error: unspecified launch failure"), lost
    with pytest.raises(RunnerError, match="the stages cannot be prepared: CUDA error: unspecified") as told:
        open_torch_runner(bundle, 4, 8, device=device).warm_up()
    assert isinstance(told.value, FatalRunnerError) == lost


def test_the_time_of_a_batch_is_the_shortest_of_its_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run after a start is slow, and another program may take the processor in any."""
    runner = open_torch_runner(bundle, 2, 8, device=BooksHost())
    runner.warm_up(0.0)
    run, seconds = runner.run, iter([0.5, 0.1, 0.3] * 8)
    monkeypatch.setattr(runner, "run", lambda stage, rows: replace(run(stage, rows), seconds=next(seconds)))
    assert runner.warm_up(inf) == [{1: 0.1, 2: 0.1}] * 4


def test_too_little_memory_for_the_state_is_reported(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED\n")

    monkeypatch.setattr("service.runners.torch_cuda.runner.Values", full)
    with pytest.raises(RunnerError, match=r"no room for the state of 8 images in flight: .*-in-flight.*FAILED\)"):
        open_torch_runner(bundle, 4, 8, device=Host())


@pytest.mark.parametrize("lost", [False, True])
def test_a_device_that_torch_cannot_use_is_reported_in_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """With torch's own error, a server with `--runner auto` once did not start, even if other runners could."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with\n")

    monkeypatch.setattr("service.runners.torch_cuda.runner.Values", refuse)
    device = BooksHost()
    device.lost = lost
    with pytest.raises(RunnerError, match=r"torch .* cannot run the stages on this device: .* on the device$") as told:
        open_torch_runner(bundle, 4, 8, device=device)
    assert isinstance(told.value, FatalRunnerError) == lost


def test_threads_that_wait_for_a_copy_do_not_spin() -> None:
    program = "import os, sys, service.runners.torch_cuda; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    said = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "passive"]  # torch reads it when imported


def test_a_graph_is_captured_only_with_enough_free_memory() -> None:
    mib = 1 << 20
    assert has_room(100 * mib, 200 * mib, 0)
    assert not has_room(100 * mib, 180 * mib, 0)  # a quarter more for fragmentation, and the graph's own memory
    assert not has_room(100 * mib, 130 * mib, 0)
    assert has_room(100 * mib, 100 * mib, 100 * mib)
    assert not has_room(0, 10 * mib, 0)


STREAM, GRAPH = 77, 88  # handles


class FakeCuda:
    """`torch.cuda`, as much as `CudaStream` asks of it: what happened, in order, and memory in MiB.

    Attributes:
        tells_handles: of graphs, as torch has since 2.10.
    """

    def __init__(self, free_mib: int) -> None:
        self.free_mib, self.reserved_mib, self.peak_mib = free_mib, 0, 100
        self.log: list[str] = []
        self.tells_handles = True
        self.stream = SimpleNamespace(cuda_stream=STREAM)

    def device(self, graphs: bool = True) -> Cuda:
        def replay(graph: int, stream: int) -> None:
            assert (graph, stream) == (GRAPH, STREAM)
            self.log.append("replay")

        return Cuda(graphs, calls=cast(CudaCalls, SimpleNamespace(replay=replay)))

    def new_graph(self) -> SimpleNamespace:
        graph = SimpleNamespace(replay=lambda: self.log.append("replay by torch"))
        if self.tells_handles:
            graph.raw_cuda_graph_exec = lambda: GRAPH
        return graph

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "Stream": lambda device: self.stream,
            "graph_pool_handle": lambda: "pool",
            "stream": lambda stream: nullcontext(),
            "CUDAGraph": self.new_graph,
            "graph": self.graph,
            "synchronize": lambda device: None,
            "empty_cache": lambda: self.log.append("empty"),
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 0,
            "max_memory_allocated": lambda device: self.peak_mib << 20,
            "memory_reserved": lambda device: self.reserved_mib << 20,
            "mem_get_info": lambda device: (self.free_mib << 20, 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def graph(self, graph: object, pool: str, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream, capture_error_mode) == ("pool", self.stream, "thread_local")
        self.log.append("capture")
        yield
        taken_mib = max(0, self.peak_mib - self.reserved_mib)  # memory of earlier captures is reused
        self.reserved_mib += taken_mib
        self.free_mib -= taken_mib


def test_a_program_is_warmed_up_then_captured_and_replayed_or_run_without_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a recorder in place of a GPU: the order of CUDA calls, and that no capture is begun without memory."""
    cuda = FakeCuda(free_mib=200)
    cuda.patch(monkeypatch)
    stream = cuda.device().open_stream()
    program = stream.prepare(lambda: cuda.log.append("program"))
    warm = ["program"] * WARM_RUNS
    assert cuda.log == [*warm, "empty", "capture", "program"]
    program()
    assert cuda.log[-1] == "replay"
    assert cuda.free_mib == 100
    stream.prepare(lambda: None)  # its memory is in the pool
    cuda.peak_mib, cuda.log = 250, []
    with pytest.raises(torch.OutOfMemoryError, match="needs 250 MiB, of which 100 are in its pool, and 100 are free"):
        stream.prepare(lambda: cuda.log.append("program"))
    assert cuda.log == [*warm, "empty"]
    cuda.log = []
    cuda.device(graphs=False).open_stream().prepare(lambda: cuda.log.append("program"))()
    assert cuda.log == [*warm, "program"]
    cuda.free_mib, cuda.log, cuda.tells_handles = 1000, [], False
    cuda.device().open_stream().prepare(lambda: cuda.log.append("program"))()
    assert cuda.log == [*warm, "empty", "capture", "program", "replay by torch"]


def test_streams_are_reused_since_torch_keeps_memory_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(free_mib=200)
    cuda.patch(monkeypatch)
    made = count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(made))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    device = cuda.device()
    streams = [device.open_stream() for _ in range(2)]
    assert [stream.use() for stream in streams] == [0, 1]
    del streams[1]
    streams += [device.open_stream() for _ in range(2)]
    assert [stream.use() for stream in streams] == [0, 1, 2]


def test_algorithms_are_searched_within_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 7.0, 10.0, 16.0, 20.0, 21.0, 30.0, 31.0])
    monkeypatch.setattr("service.runners.torch_cuda.device.time.perf_counter", lambda: next(clock))
    calls = cast(CudaCalls, SimpleNamespace())  # none is made
    device, searched = Cuda(search_s=10.0, calls=calls), []
    for _ in range(3):
        with device.searching():
            searched.append(torch.backends.cudnn.benchmark)
        assert not torch.backends.cudnn.benchmark
    assert searched == [True, True, False]
    with Cuda(
        graphs=False, calls=calls
    ).searching():  # its results would not apply to the threads that run the programs
        assert not torch.backends.cudnn.benchmark


def test_an_error_fails_one_batch_unless_the_device_is_lost(bundle: Bundle, images: NDArray[np.uint8]) -> None:
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
    del told, row
    assert all_free(runner.slots)


def test_a_failed_launch_keeps_its_buffers_and_slots_until_its_turn(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    """Otherwise the next batch would reuse the buffers of one that still runs, and mix up their answers."""
    device = BooksHost()
    runner = open_torch_runner(bundle, 4, 8, n_lanes=1, device=device)
    runner.warm_up()
    wanted = [runner.run(0, [runner.first_state(image)]).logits for image in images[:3]]
    first, second, third = ([runner.first_state(image)] for image in images[:3])
    running = runner.launch(0, first)
    device.error = RuntimeError("CUDA error: invalid argument")
    failing = runner.launch(0, second, running)
    device.error, device.busy = None, True  # with what it has put on the stream
    assert running.has_run()  # its mark has been passed
    assert not failing.has_run()
    n_free = runner.slots.n_free
    del second
    assert runner.slots.n_free == n_free
    assert np.array_equal(running.collect().logits, wanted[0])
    following = runner.launch(0, third, failing)
    device.busy = False
    assert failing.has_run()
    assert device.waits == 0
    with pytest.raises(RunnerError, match="stage 1 failed on a batch of 1: CUDA error: invalid argument"):
        failing.collect()
    assert device.waits == 1  # its slots are free from now on
    assert np.array_equal(following.collect().logits, wanted[2])
    del first, third, running, failing, following
    assert all_free(runner.slots)


def test_a_lane_is_given_back_once_though_a_launch_behind_its_batch_fails(
    bundle: Bundle, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given back twice, it would run two batches at once, in the same buffers."""
    runner = open_torch_runner(bundle, 4, 8, n_lanes=1, device=Host())
    runner.warm_up(0.0)

    def fail(*batch: object) -> None:
        raise RuntimeError("no thread can be started")

    running = runner.launch(0, [runner.first_state(images[0])])
    monkeypatch.setattr(runner.lanes[0], "launch", fail)
    with pytest.raises(RunnerError, match="no thread can be started"):
        runner.launch(0, [runner.first_state(images[1])], running)
    assert runner._idle.qsize() == 0
    running.collect()
    assert runner._idle.qsize() == 1


def test_rows_given_up_while_two_batches_run_leave_slots_for_all_that_may_be_in_flight(
    bundle: Bundle, images: NDArray[np.uint8]
) -> None:
    runner = open_torch_runner(bundle, 4, 8, n_lanes=1, device=Host())
    runner.warm_up(0.0)
    running = runner.launch(0, runner.first_states(images, range(4)))
    following = runner.launch(0, runner.first_states(images, range(4)), running)  # nobody else holds their rows
    rows = runner.first_states(images, range(8))
    runner.slots.begin(rows)
    assert len({row.slot for row in rows}) == 8
    running.collect()
    following.collect()


def test_a_batch_too_large_for_every_bucket_is_refused(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    runner = open_torch_runner(bundle, 4, 8, device=Host())
    with pytest.raises(RunnerError, match="stage 1 got 5 images at once, but takes at most 4"):
        runner.run(0, [runner.first_state(image) for image in images[:5]])
    assert all_free(runner.slots)


@pytest.mark.parametrize("says", [True, False, RuntimeError("CUDA error: an illegal memory access was encountered")])
def test_a_lost_device_is_detected_without_waiting(monkeypatch: pytest.MonkeyPatch, says: bool | Exception) -> None:
    def query() -> bool:  # what has all run, or not, or an error that sticks
        if isinstance(says, Exception):
            raise says
        return says

    def wait(device: object) -> None:
        raise AssertionError("a batch may hang there")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=query))
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    device = Cuda(calls=cast(CudaCalls, SimpleNamespace()))
    assert device.is_lost() == isinstance(says, Exception)
