"""The CUDA calls of a launch, with a library in place of CUDA's that does the same on the host, synchronously."""

import ctypes
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from service.runners.base import RunnerError
from service.runners.torch_cuda.cuda_calls import DEFAULT, NOT_READY, CudaCalls, CudaCopier, CudaMark, CudaReplay

STREAM, GRAPH, EVENT = 5, 6, 7
FAILED = 719


class FakeRuntime:
    """Functions whose argument and result types can be set, like those of a shared library."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.error = 0  # what the next calls return
        self.last_error = 0

        def answer(call: str, *arguments: int) -> int:
            self.log.append((call, *arguments))
            self.last_error = self.error
            return self.error

        def memcpy(there: int, here: int, n_bytes: int, kind: int, stream: int) -> int:
            ctypes.memmove(there, here, n_bytes)
            return answer("copy", n_bytes, kind, stream)

        def last_error() -> int:
            self.last_error = 0
            return 0

        self.cudaMemcpyAsync = memcpy
        self.cudaGraphLaunch = lambda graph, stream: answer("replay", graph, stream)
        self.cudaEventRecord = lambda event, stream: answer("record", event, stream)
        self.cudaEventQuery = lambda event: answer("query", event)
        self.cudaGetLastError = last_error
        self.cudaGetErrorString = lambda code: f"error {code}".encode()


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def stream() -> torch.cuda.Stream:
    return cast(torch.cuda.Stream, SimpleNamespace(cuda_stream=STREAM))


def test_rows_are_copied_to_their_places(runtime: FakeRuntime, stream: torch.cuda.Stream) -> None:
    here = torch.arange(60, dtype=torch.int64).reshape(10, 2, 3)
    there = torch.zeros((5, 2, 3), dtype=torch.int64)
    copier = CudaCopier(CudaCalls(runtime), stream, there, here)
    copier(1, 6, 3)
    copier(0, 0, 1)
    assert torch.equal(there[1:4], here[6:9])
    assert torch.equal(there[0], here[0])
    assert not there[4].any()
    assert runtime.log == [("copy", 3 * 48, DEFAULT, STREAM), ("copy", 48, DEFAULT, STREAM)]
    for others in (there[:, :1], torch.zeros((5, 2, 4), dtype=torch.int64)):
        with pytest.raises(ValueError, match="cannot be copied to"):
            CudaCopier(CudaCalls(runtime), stream, others, here)


def test_a_graph_is_replayed_on_its_stream(runtime: FakeRuntime, stream: torch.cuda.Stream) -> None:
    CudaReplay(CudaCalls(runtime), stream, SimpleNamespace(raw_cuda_graph_exec=lambda: GRAPH))()
    assert runtime.log == [("replay", GRAPH, STREAM)]


def test_it_waits_for_a_mark_only_if_it_has_not_passed(
    runtime: FakeRuntime, stream: torch.cuda.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    class Event:
        cuda_event = EVENT

        def record(self, on: object) -> None:
            assert on is stream

        def synchronize(self) -> None:
            waited.append(EVENT)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    mark = CudaMark(CudaCalls(runtime), stream)
    mark.record()
    assert runtime.log == [("record", EVENT, STREAM)]
    assert mark.query()
    mark.synchronize()
    assert waited == []
    runtime.error = NOT_READY
    assert not mark.query()
    assert runtime.last_error == 0  # otherwise torch would attribute it to its next call
    mark.synchronize()
    assert waited == [EVENT]


def test_cudas_error_messages_are_reported(runtime: FakeRuntime, stream: torch.cuda.Stream) -> None:
    calls, rows = CudaCalls(runtime), torch.zeros(4)
    runtime.error = FAILED
    for call in (
        lambda: CudaCopier(calls, stream, rows, rows)(0, 0, 1),
        lambda: calls.replay(GRAPH, STREAM),
        lambda: calls.record(EVENT, STREAM),
        lambda: calls.has_passed(EVENT),
    ):
        with pytest.raises(RuntimeError, match="CUDA error: error 719"):
            call()
        assert runtime.last_error == 0


def test_calls_keep_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(ctypes, "PyDLL", lambda name: opened.append(name) or FakeRuntime())  # `CDLL` passes it on
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    CudaCalls()
    assert opened == ["libcudart.so.13"]


def test_a_missing_runtime_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    with pytest.raises(RunnerError, match=r"cannot be loaded: libcudart\.so\.99"):
        CudaCalls()
