"""The CUDA calls of a launch, made without releasing Python's interpreter lock.

Torch releases the lock at every copy, replay and event. Each takes microseconds, less than waking a thread that waits
for the lock; and getting the lock back takes until another thread releases it. So calls that only put work on a stream
are made here through ctypes, which can keep the lock. Calls that wait are left to torch.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from service.runners.base import RunnerError

SUCCESS, NOT_READY = 0, 600  # cudaError_t
DEFAULT = 4  # cudaMemcpyKind: the direction follows from the addresses


class CudaCalls:
    """CUDA's runtime library, as loaded by torch. Streams, graphs and events are passed as handles.

    Args:
        library: the runtime; by default the one that torch was built for.

    Raises:
        RunnerError: the library cannot be loaded.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            major = (torch.version.cuda or "").split(".")[0]
            try:
                library = ctypes.PyDLL(f"libcudart.so.{major}")
            except OSError as error:
                raise RunnerError(f"CUDA's runtime, which comes with torch, cannot be loaded: {error}") from error
        handle, address, size = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
        self._copy = _typed(library.cudaMemcpyAsync, address, address, size, ctypes.c_int, handle)
        self._replay = _typed(library.cudaGraphLaunch, handle, handle)
        self._record = _typed(library.cudaEventRecord, handle, handle)
        self._query = _typed(library.cudaEventQuery, handle)
        self._forget_error = _typed(library.cudaGetLastError)
        self._words = _typed(library.cudaGetErrorString, ctypes.c_int, returns=ctypes.c_char_p)

    def copy(self, target: int, source: int, n_bytes: int, stream: int) -> None:
        """Put a copy from address `source` to address `target` on a stream; host memory must be pinned."""
        self._require(self._copy(target, source, n_bytes, DEFAULT, stream))

    def replay(self, graph: int, stream: int) -> None:
        """Put a captured and instantiated graph on a stream."""
        self._require(self._replay(graph, stream))

    def record(self, event: int, stream: int) -> None:
        self._require(self._record(event, stream))

    def has_passed(self, event: int) -> bool:
        """Whether all work that was on the stream when the event was last recorded has run."""
        if (code := self._query(event)) == NOT_READY:
            self._forget_error()  # else the next call that asks for errors gets this one
            return False
        self._require(code)
        return True

    def _require(self, code: int) -> None:
        if code != SUCCESS:
            self._forget_error()
            raise RuntimeError(f"CUDA error: {self._words(code).decode()}")  # torch's wording


def _typed(function: Any, *arguments: Any, returns: Any = ctypes.c_int) -> Any:
    function.argtypes, function.restype = arguments, returns
    return function


class CudaCopier:
    """Copies rows of `source` to `target` on a stream; see `device.Stream.copier`."""

    def __init__(self, calls: CudaCalls, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> None:
        if not (target.is_contiguous() and source.is_contiguous() and target.stride(0) == source.stride(0)):
            raise ValueError(f"rows of {tuple(source.shape)} cannot be copied to {tuple(target.shape)}")
        self._kept = (target, source)  # keeps their memory alive
        self._target, self._source = target.data_ptr(), source.data_ptr()
        self._row_bytes = target.stride(0) * target.element_size()
        self._copy, self._stream = calls.copy, stream.cuda_stream

    def __call__(self, to_row: int, from_row: int, n_rows: int) -> None:
        n_bytes = self._row_bytes
        self._copy(self._target + to_row * n_bytes, self._source + from_row * n_bytes, n_rows * n_bytes, self._stream)


class CudaReplay:
    """Puts a captured graph on a stream."""

    def __init__(self, calls: CudaCalls, stream: torch.cuda.Stream, graph: Any) -> None:
        self._kept = graph
        self._replay, self._graph, self._stream = calls.replay, graph.raw_cuda_graph_exec(), stream.cuda_stream

    def __call__(self) -> None:
        self._replay(self._graph, self._stream)


class CudaMark:
    """A reusable CUDA event; see `device.Mark`."""

    def __init__(self, calls: CudaCalls, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)  # torch creates the event at its first recording
        self._calls, self._handle, self._stream = calls, self._event.cuda_event, stream.cuda_stream

    def record(self) -> None:
        self._calls.record(self._handle, self._stream)

    def query(self) -> bool:
        return self._calls.has_passed(self._handle)

    def synchronize(self) -> None:
        if not self.query():
            self._event.synchronize()
