"""One lane: a session a stage, buffers that stay where they are, and a binding for every stage and bucket.

What is bound never changes place or shape, as CUDA graphs ask for it: a batch is written into the buffers of its
bucket, and its logits are read from there.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.manifest import StageInfo
from service.runners.base import Heads
from service.runners.blocks import Array
from service.runners.onnx_device.graph import SLOTS, store, stored
from service.runners.onnx_device.staging import Staging
from service.runners.slots import SCRATCH, SlotState, places_of, stretches
from service.runners.slotted import Running

Stores = Mapping[str, ort.OrtValue]
T = TypeVar("T")
logger = logging.getLogger(__name__)


class OnnxLane:
    """See the module; a `slotted.Lane`.

    Args:
        sessions: of the extended stages, this lane's own: a session that replays graphs may not run twice at once.
        stages: as the manifest has them.
        stores: on the device, shared by all lanes.
        kind: of the device, as ONNX Runtime calls it.
        pictures: [places, *image_shape] on the host, see `SlotRunner`.
        own_thread: whether all is run on one thread of the lane's own, whoever asks for it. Graphs ask for that: ONNX
            Runtime keeps what it captures by thread. One that meets a batch first would run it unprepared and capture
            it while other lanes work, and what these ask of CUDA meanwhile breaks such a capture off.
    """

    def __init__(
        self,
        sessions: Sequence[ort.InferenceSession],
        stages: Sequence[StageInfo],
        stores: Stores,
        kind: str,
        *,
        pictures: Array,
        own_thread: bool = False,
    ) -> None:
        self._own_thread = _OwnThread() if own_thread else None
        self.sessions, self._stages, self._stores, self._kind = sessions, stages, stores, kind
        self._image, self._pictures = stages[0].inputs[0], pictures
        self._staging = Staging(kind)
        self._slots: dict[int, tuple[Array, Any]] = {}  # by bucket: as written on the host, and on the device
        self._images: dict[int, tuple[Array, Any]] = {}  # likewise
        self._programs: dict[tuple[int, int], tuple[Any, Any, Any]] = {}  # by stage and bucket; see `_bind`
        self._told: dict[tuple[int, int], Any] = {}  # by the same: logits on the host, where they can be copied there

    def prepare(self, stage: int, bucket: int) -> None:
        if self._own_thread is None:
            return self._prepare(stage, bucket)
        return self._own_thread.run(partial(self._prepare, stage, bucket))

    def launch(
        self, stage: int, bucket: int, slots: list[int], begin: list[SlotState], with_logits: bool = True
    ) -> Running:
        """See `slotted.Lane`. ONNX Runtime's copies wait, so all is done when it is collected. Logits are all it tells,
        so they always come."""
        run = partial(self._run, stage, bucket, slots, begin)
        return Running(run if self._own_thread is None else partial(self._own_thread.run, run))

    def _prepare(self, stage: int, bucket: int) -> None:
        if bucket not in self._slots:
            shapes = (((bucket,), "int64"), ((bucket, *self._image.shape), self._image.dtype))
            self._slots[bucket], self._images[bucket] = (
                (self._staging.array(shape, dtype), self._tensor(shape, dtype)) for shape, dtype in shapes
            )
        self._programs[stage, bucket] = self._bind(stage, bucket)
        # With graphs, ONNX Runtime runs it twice as it is, captures it, and replays it from then on.
        self._run(stage, bucket, [SCRATCH], [])
        self._stage_logits(stage, bucket)

    def _run(
        self, stage: int, bucket: int, slots: list[int], begin: list[SlotState]
    ) -> tuple[NDArray[np.float32], Heads | None]:
        n_rows = len(slots)
        host, there = self._slots[bucket]
        host[:n_rows], host[n_rows:] = slots, SCRATCH
        there.update_inplace(host)
        if begin:
            host, there = self._images[bucket]
            start = 0
            for first, n_alike in stretches(places_of(begin)):
                host[start : start + n_alike] = self._pictures[first : first + n_alike]
                start += n_alike
            there.update_inplace(host)
        binding, options, logits = self._programs[stage, bucket]
        self.sessions[stage].run_with_iobinding(binding, options)  # comes back when the device is done
        told = self._told.get((stage, bucket))
        if told is not None:
            told.update_inplace(logits)
        return np.array((told or logits).numpy()[:n_rows]), None  # a copy: in host memory `numpy` is a view

    def _stage_logits(self, stage: int, bucket: int) -> None:
        """Have logits copied to an array that stays, if ONNX Runtime can: else `numpy` makes a new one each time."""
        logits = self._programs[stage, bucket][2]
        told = ort.OrtValue.ortvalue_from_numpy(
            self._staging.array(logits.shape(), self._stages[stage].outputs[0].dtype)
        )
        try:
            told.update_inplace(logits)
        except Exception as error:  # as for sessions: no common base
            logger.info("logits are not copied to pinned memory: %s", error)
            return
        if np.array_equal(told.numpy(), logits.numpy(), equal_nan=True):
            self._told[stage, bucket] = told

    def _bind(self, stage: int, bucket: int) -> tuple[Any, Any, Any]:
        """What a stage at a bucket is run with: its binding, run options, and the tensor that has its logits."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(bucket))  # one captured graph a bucket; 0 is ONNX Runtime's
        first = self._stages[stage].outputs[0]
        logits = self._tensor((bucket, *first.shape), first.dtype)
        session = self.sessions[stage]
        binding = session.io_binding()
        inputs = {store(name): value for name, value in self._stores.items()} | {SLOTS: self._slots[bucket][1]}
        inputs[self._image.name] = self._images[bucket][1]
        for one in session.get_inputs():
            binding.bind_ortvalue_input(one.name, inputs[one.name])
        outputs = {stored(name): value for name, value in self._stores.items()} | {first.name: logits}
        for one in session.get_outputs():
            binding.bind_ortvalue_output(one.name, outputs[one.name])
        return binding, options, logits

    def _tensor(self, shape: Sequence[int], dtype: str) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype), self._kind)


class _OwnThread:
    """A thread that runs what it is told, one after the other, until nobody refers to this any more.

    A daemon, unlike a pool's: where the device hangs under it, the process is to end all the same.
    """

    def __init__(self) -> None:
        self._told: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._told,), name="exitserve-onnx-lane", daemon=True).start()
        weakref.finalize(self, self._told.put, None)

    def run(self, function: Callable[[], T]) -> T:
        """Run a function there, and wait for it; returns or raises what it does."""
        future: Future[T] = Future()
        self._told.put((function, future))
        try:
            return future.result()
        finally:
            del future  # else an error would hold it by its traceback, and it the error with all that its call has had


def _work(told: "SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]") -> None:
    while (one := told.get()) is not None:
        function, future = one
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
        del one, function, future  # what it waits with would keep its lane alive
