"""Where programs run. A program is a function without arguments: it reads and writes tensors that stay where they are.

On CUDA it is captured once as a graph and replayed from then on; on the host, where this is tested, it is called.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

Program = Callable[[], None]
WARM_RUNS = 3  # before a capture: libraries choose algorithms and allocate at the first runs


class Stream(Protocol):
    """What is put on one stream runs in order; several streams run at the same time."""

    def use(self) -> AbstractContextManager[Any]:
        """Within it, this thread's copies and programs go to this stream."""
        ...

    def prepare(self, program: Program) -> Program:
        """Return what to call in the place of `program`, on this stream alone."""
        ...

    def wait(self) -> None:
        """Wait until all that was put on the stream has run."""
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
        """After an error: can nothing run on the device any more, in this process?"""
        ...


class HostStream:
    def use(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def prepare(self, program: Program) -> Program:
        program()
        return program

    def wait(self) -> None:
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

    def __init__(self, device: torch.device, graphs: bool) -> None:
        self._graphs = graphs
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        self._pool = torch.cuda.graph_pool_handle()

    def use(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def prepare(self, program: Program) -> Program:
        torch.cuda.synchronize(self._stream.device)  # what the program reads was made on another stream
        with self.use():
            for _ in range(WARM_RUNS):
                program()
        torch.cuda.synchronize(self._stream.device)
        if not self._graphs:
            return program
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do with CUDA meanwhile is no part of the capture, and no error.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            program()
        return graph.replay

    def wait(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()  # the one synchronisation of a batch: its verdicts are needed here


class Cuda:
    """A CUDA device.

    Args:
        graphs: False runs programs kernel by kernel (for comparison).
    """

    pins = True

    def __init__(self, index: int = 0, graphs: bool = True) -> None:
        self.kind = torch.device("cuda", index)
        self._graphs = graphs
        # The fastest algorithm of each convolution is looked for at its first run, that is, at warm-up.
        torch.backends.cudnn.benchmark = True

    def open_stream(self) -> Stream:
        return CudaStream(self.kind, self._graphs)

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize(self.kind)  # an error that sticks comes back with every call
        except RuntimeError:
            return True
        return False
