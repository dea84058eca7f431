"""Where programs run. A program is a function without arguments: it reads and writes tensors that stay where they are.

On CUDA it is captured once as a graph and replayed from then on; on the host, where this is tested, it is called.
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
"""Copies rows: to which on, from which on, and how many. It may end before they are copied."""
WARM_RUNS = 3  # before a capture: libraries choose algorithms and allocate at the first runs
SEARCH_S = 30.0  # of a process, see `Cuda.searching`
SPARE_BYTES = 64 << 20  # for the graph itself, and for rounding


class Mark(Protocol):
    """A point in what is put on a stream; CUDA's events are such."""

    def record(self) -> None:
        """From now on it is the point behind all that was put on the stream so far."""
        ...

    def query(self) -> bool:
        """Whether all before it has run."""
        ...

    def synchronize(self) -> None:
        """Wait for that."""
        ...


class Stream(Protocol):
    """What is put on one stream runs in order; several streams run at the same time."""

    def use(self) -> AbstractContextManager[Any]:
        """Within it, what this thread has torch do goes to this stream."""
        ...

    def prepare(self, program: Program) -> Program:
        """Return what puts `program` on this stream; any thread may call it."""
        ...

    def copier(self, there: Tensor, here: Tensor) -> Copier:
        """Return what puts copies of rows of `here` to `there` on this stream; both lie in one piece."""
        ...

    def mark(self) -> Mark:
        """A point behind all that was put on the stream so far."""
        ...

    def query(self) -> bool:
        """Whether all that was put on the stream has run."""
        ...

    def wait(self) -> None:
        """Wait for that."""
        ...


class Device(Protocol):
    """A device, as much of it as the runner needs."""

    @property
    def kind(self) -> torch.device: ...

    @property
    def pins(self) -> bool:
        """Whether host memory is to be pinned for copies that do not block."""
        ...

    def open_stream(self) -> Stream: ...

    def release_memory(self) -> None:
        """Give unused memory back, so that a smaller try finds it."""
        ...

    def is_lost(self) -> bool:
        """After an error: can nothing run on the device any more, in this process? Told without waiting for it: the
        engine's thread asks, and another lane's batch may hang."""
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

    def copier(self, there: Tensor, here: Tensor) -> Copier:
        @torch.inference_mode()
        def copy(to_row: int, from_row: int, n_rows: int) -> None:
            there[to_row : to_row + n_rows].copy_(here[from_row : from_row + n_rows])

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
    """The CPU, on which everything has run when its call returns."""

    kind = torch.device("cpu")
    pins = False

    def open_stream(self) -> Stream:
        return HostStream()

    def release_memory(self) -> None:
        pass

    def is_lost(self) -> bool:
        return False


class CudaStream:
    """A CUDA stream whose programs are graphs that share one pool of memory.

    They may, although it is theirs to reuse: all graphs of a stream run one after the other, and none leaves a tensor
    in the pool that another one reads.
    """

    def __init__(self, device: "Cuda", stream: torch.cuda.Stream) -> None:
        self._device, self._stream = device, stream
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_bytes = 0  # taken from the device so far; free again while no graph is captured

    def __del__(self) -> None:
        self._device.streams.append(self._stream)

    def use(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def prepare(self, program: Program) -> Program:
        kind = self._device.kind
        torch.cuda.synchronize(kind)  # what the program reads was made on another stream
        with self.use(), self._device.searching():
            for _ in range(WARM_RUNS):
                torch.cuda.reset_peak_memory_stats(kind)
                before = torch.cuda.memory_allocated(kind)
                program()
        torch.cuda.synchronize(kind)
        if not self._device.graphs:
            return self._by_torch(program)
        # Of the last run: the first ones took more, to try algorithms.
        self._require_room(torch.cuda.max_memory_allocated(kind) - before)
        graph = torch.cuda.CUDAGraph()
        reserved = torch.cuda.memory_reserved(kind)
        # "thread_local": what other threads do with CUDA meanwhile is no part of the capture, and no error.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            program()
        self._pool_bytes += max(0, torch.cuda.memory_reserved(kind) - reserved)
        if not hasattr(graph, "raw_cuda_graph_exec"):  # an older torch's
            return self._by_torch(graph.replay)
        return CudaReplay(self._device.calls, self._stream, graph)

    def _by_torch(self, program: Program) -> Program:
        @torch.inference_mode()
        def run() -> None:
            with self.use():
                program()

        return run

    def copier(self, there: Tensor, here: Tensor) -> Copier:
        return CudaCopier(self._device.calls, self._stream, there, here)

    def mark(self) -> Mark:
        return CudaMark(self._device.calls, self._stream)

    def query(self) -> bool:
        return self._stream.query()

    def wait(self) -> None:
        self._stream.synchronize()

    def _require_room(self, n_bytes: int) -> None:
        """Before a capture: one that runs out of memory cannot be mended.

        Up to torch 2.11, a capture that CUDA has broken off leaves the allocator in the belief that it goes on, and no
        memory is given back to the device any more in this process (pytorch/pytorch, pull request 180395).
        """
        torch.cuda.empty_cache()  # what the warm-up took; a capture takes its memory anew, from the pool
        free, _ = torch.cuda.mem_get_info(self._device.kind)
        if not has_room(n_bytes, free, self._pool_bytes):
            raise torch.OutOfMemoryError(
                f"out of memory: a graph needs {n_bytes >> 20} MiB, of which {self._pool_bytes >> 20} are in its pool, "
                f"and {free >> 20} are free"
            )


def has_room(n_bytes: int, free_bytes: int, pool_bytes: int) -> bool:
    """Whether what took `n_bytes` at its peak can be captured; blocks of memory have gaps between them."""
    return n_bytes + n_bytes // 4 + SPARE_BYTES <= free_bytes + pool_bytes


class Cuda:
    """The first CUDA device.

    Args:
        graphs: False runs programs kernel by kernel (for comparison).
        search_s: how long the fastest algorithms of convolutions are looked for; see `searching`.

    Attributes:
        streams: that nobody uses any more, for those who open one next. For cuBLAS torch keeps memory by stream, 32 MiB
            on an H200, for ever: every try with smaller batches would take as much again as it was to save.
    """

    pins = True

    def __init__(self, graphs: bool = True, search_s: float = SEARCH_S, calls: CudaCalls | None = None) -> None:
        self.kind = torch.device("cuda", 0)
        self.calls = calls or CudaCalls()
        self.graphs = graphs
        self.search_left_s = search_s
        self.streams: list[torch.cuda.Stream] = []
        # Else cuBLAS may add up in half precision what it splits, which moves scores more than all else does here.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def open_stream(self) -> Stream:
        return CudaStream(self, self.streams.pop() if self.streams else torch.cuda.Stream(self.kind))

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Within it, cuDNN tries all its algorithms where a shape is new to it, as long as there is time left for that.

        To build and try them takes up to a second for each convolution and batch size, and a network has hundreds of
        them in nine sizes. The largest batches come first, where it matters; the rest is left to cuDNN's heuristics.
        What was found is kept by thread, so it is of no use to programs that other threads run kernel by kernel.
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
            torch.cuda.current_stream(self.kind).query()  # an error that sticks comes back with every call
        except RuntimeError:
            return True
        return False
