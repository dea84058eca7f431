"""Where programs run. A program is a function without arguments that reads and writes tensors at fixed addresses.

On CUDA, a program is captured once as a graph, which is then replayed. On the host, where this is tested, it is called.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from service.runners.torch_cuda.cuda_calls import CudaCalls, CudaCopier, CudaMark, CudaReplay

Program = Callable[[], None]
Copier = Callable[[int, int, int], None]
"""Copies rows: (first row to write, first row to read, number of rows). It may return before they are copied."""
WARM_RUNS = 3  # before a capture: libraries choose algorithms and allocate memory in the first runs
SEARCH_S = 30.0  # in all, see `Cuda.searching`
SPARE_BYTES = 64 << 20  # for the graph itself, and for rounding up


class Mark(Protocol):
    """A point in the work on a stream, like a CUDA event."""

    def record(self) -> None:
        """Move the mark behind all work that is on the stream now."""
        ...

    def query(self) -> bool:
        """Whether all work before the mark has run."""
        ...

    def synchronize(self) -> None:
        """Wait until all work before the mark has run."""
        ...


class Stream(Protocol):
    """Work on one stream runs in order; different streams run concurrently."""

    def use(self) -> AbstractContextManager[Any]:
        """A context in which torch puts this thread's work on this stream."""
        ...

    def prepare(self, program: Program) -> Program:
        """Return a function that launches `program` on this stream; any thread may call it."""
        ...

    def copier(self, target: Tensor, source: Tensor) -> Copier:
        """Return a function that copies rows of `source` to `target` on this stream. Both are contiguous."""
        ...

    def mark(self) -> Mark:
        """A new mark behind all work that is on the stream now."""
        ...

    def query(self) -> bool:
        """Whether all work on the stream has run."""
        ...

    def wait(self) -> None:
        """Wait until all work on the stream has run."""
        ...


class Device(Protocol):
    """What the runner needs of a device."""

    @property
    def kind(self) -> torch.device: ...

    @property
    def pins(self) -> bool:
        """Whether copies need pinned host memory in order not to block."""
        ...

    def open_stream(self) -> Stream: ...

    def release_memory(self) -> None:
        """Return unused memory to the device, so that an attempt with smaller batches finds it."""
        ...

    def is_lost(self) -> bool:
        """Whether, after an error, nothing can run on the device any more in this process. Does not wait for it, as the
        engine's thread calls this and another lane's batch may hang."""
        ...


class HostStream:
    def use(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def prepare(self, program: Program) -> Program:
        @torch.inference_mode()
        def run() -> None:
            program()

        run()
        return run

    def copier(self, target: Tensor, source: Tensor) -> Copier:
        @torch.inference_mode()
        def copy(to_row: int, from_row: int, n_rows: int) -> None:
            target[to_row : to_row + n_rows].copy_(source[from_row : from_row + n_rows])

        return copy

    def mark(self) -> Mark:
        return self

    def wait(self) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Host:
    """The CPU, which runs everything synchronously."""

    kind = torch.device("cpu")
    pins = False

    def open_stream(self) -> Stream:
        return HostStream()

    def release_memory(self) -> None:
        pass

    def is_lost(self) -> bool:
        return False


class CudaStream:
    """A CUDA stream whose programs are graphs that share one memory pool.

    Sharing is safe although each graph overwrites the pool: the graphs of a stream run one at a time, and none leaves a
    tensor in the pool for another one to read.
    """

    def __init__(self, device: "Cuda", stream: torch.cuda.Stream) -> None:
        self._device, self._stream = device, stream
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_bytes = 0  # reserved from the device so far; the next capture reuses them

    def __del__(self) -> None:
        self._device.streams.append(self._stream)

    def use(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def prepare(self, program: Program) -> Program:
        kind = self._device.kind
        torch.cuda.synchronize(kind)  # the program's inputs were written on another stream
        with self.use(), self._device.searching():
            for _ in range(WARM_RUNS):
                torch.cuda.reset_peak_memory_stats(kind)
                before = torch.cuda.memory_allocated(kind)
                program()
        torch.cuda.synchronize(kind)
        if not self._device.graphs:
            return self._by_torch(program)
        # The peak of the last run: earlier ones took more, to try algorithms.
        self._require_room(torch.cuda.max_memory_allocated(kind) - before)
        graph = torch.cuda.CUDAGraph()
        reserved = torch.cuda.memory_reserved(kind)
        # "thread_local": CUDA calls of other threads meanwhile are not part of the capture and do not break it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            program()
        self._pool_bytes += max(0, torch.cuda.memory_reserved(kind) - reserved)
        if not hasattr(graph, "raw_cuda_graph_exec"):  # an older torch
            return self._by_torch(graph.replay)
        return CudaReplay(self._device.calls, self._stream, graph)

    def _by_torch(self, program: Program) -> Program:
        @torch.inference_mode()
        def run() -> None:
            with self.use():
                program()

        return run

    def copier(self, target: Tensor, source: Tensor) -> Copier:
        return CudaCopier(self._device.calls, self._stream, target, source)

    def mark(self) -> Mark:
        return CudaMark(self._device.calls, self._stream)

    def query(self) -> bool:
        return self._stream.query()

    def wait(self) -> None:
        self._stream.synchronize()

    def _require_room(self, n_bytes: int) -> None:
        """Raise torch.OutOfMemoryError if there is too little memory for a capture, which must not run out of it.

        In torch up to 2.11, the allocator goes on as if an invalidated capture were still running, and this process can
        return no more memory to the device (pytorch/pytorch, pull request 180395).
        """
        torch.cuda.empty_cache()  # the memory of the warm-up runs: the capture allocates anew, from the pool
        free, _ = torch.cuda.mem_get_info(self._device.kind)
        if not has_room(n_bytes, free, self._pool_bytes):
            raise torch.OutOfMemoryError(
                f"out of memory: a graph needs {n_bytes >> 20} MiB, of which {self._pool_bytes >> 20} are in its pool, "
                f"and {free >> 20} are free"
            )


def has_room(n_bytes: int, free_bytes: int, pool_bytes: int) -> bool:
    """Whether a program that took `n_bytes` at its peak can be captured, with a margin for fragmentation."""
    return n_bytes + n_bytes // 4 + SPARE_BYTES <= free_bytes + pool_bytes


class Cuda:
    """The first CUDA device.

    Args:
        graphs: False runs programs kernel by kernel, for comparison.
        search_s: how long to search for the fastest convolution algorithms; see `searching`.

    Attributes:
        streams: closed streams, for reuse. Torch keeps memory for cuBLAS per stream, 32 MiB on an H200, and never
            releases it: each attempt with smaller batches would take more of the memory that it should save.
    """

    pins = True

    def __init__(self, graphs: bool = True, search_s: float = SEARCH_S, calls: CudaCalls | None = None) -> None:
        self.kind = torch.device("cuda", 0)
        self.calls = calls or CudaCalls()
        self.graphs = graphs
        self.search_left_s = search_s
        self.streams: list[torch.cuda.Stream] = []
        # Else cuBLAS may sum partial results in half precision, which changes scores more than all else here.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def open_stream(self) -> Stream:
        return CudaStream(self, self.streams.pop() if self.streams else torch.cuda.Stream(self.kind))

    @contextmanager
    def searching(self) -> Iterator[None]:
        """A context in which cuDNN tries all its algorithms for each new shape, as long as search time is left.

        Building and trying them takes up to a second per convolution and batch size. With nine batch sizes there are
        hundreds of these. The largest batches, which matter most, come first; the rest is left to cuDNN's heuristics.
        Results are cached per thread, so programs that other threads run kernel by kernel do not benefit.
        """
        started = time.perf_counter()
        torch.backends.cudnn.benchmark = self.graphs and self.search_left_s > 0
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = False
            self.search_left_s -= time.perf_counter() - started

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        try:
            torch.cuda.current_stream(self.kind).query()  # a sticky error is returned by every later call
        except RuntimeError:
            return True
        return False
