"""One lane: a session per stage, and a binding to fixed buffers for every stage and bucket.

Bound buffers never move or change shape, which CUDA graphs require: a batch is copied into the buffers of its bucket,
and its logits are read from there.
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
    """A `slotted.Lane`; see the module.

    Args:
        sessions: of the extended stages, this lane's own: a session that replays graphs cannot run twice at once.
        stages: the manifest's.
        stores: on the device, by the value's name; shared by all lanes.
        kind: ONNX Runtime's name for the kind of device.
        pictures: [places, *image_shape] on the host, see `SlotRunner`.
        own_thread: whether everything runs on one thread of the lane's own. CUDA graphs need this: ONNX Runtime keeps
            captured graphs per thread. A thread new to a bucket would run it without a graph and then capture one, and
            calls that other lanes make to CUDA meanwhile would invalidate the capture.
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
        self._slots: dict[int, tuple[Array, Any]] = {}  # by bucket: on the host, and on the device
        self._images: dict[int, tuple[Array, Any]] = {}  # likewise
        self._programs: dict[tuple[int, int], tuple[Any, Any, Any]] = {}  # by stage and bucket; see `_bind`
        self._on_host: dict[tuple[int, int], Any] = {}  # likewise: logits in pinned memory, if they can be copied there

    def prepare(self, stage: int, bucket: int) -> None:
        if self._own_thread is None:
            return self._prepare(stage, bucket)
        return self._own_thread.run(partial(self._prepare, stage, bucket))

    def launch(
        self, stage: int, bucket: int, slots: list[int], begin: list[SlotState], with_logits: bool = True
    ) -> Running:
        """See `slotted.Lane`. As ONNX Runtime's copies block, the batch only runs when it is collected. There are no
        heads, so logits are always returned."""
        run = partial(self._run, stage, bucket, slots, begin)
        return Running(run if self._own_thread is None else partial(self._own_thread.run, run))

    def _prepare(self, stage: int, bucket: int) -> None:
        if bucket not in self._slots:
            shapes = (((bucket,), "int64"), ((bucket, *self._image.shape), self._image.dtype))
            self._slots[bucket], self._images[bucket] = (
                (self._staging.array(shape, dtype), self._tensor(shape, dtype)) for shape, dtype in shapes
            )
        self._programs[stage, bucket] = self._bind(stage, bucket)
        # With graphs, ONNX Runtime runs a stage twice without one, captures it, and replays the graph from then on.
        self._run(stage, bucket, [SCRATCH], [])
        self._stage_logits(stage, bucket)

    def _run(
        self, stage: int, bucket: int, slots: list[int], begin: list[SlotState]
    ) -> tuple[NDArray[np.float32], Heads | None]:
        n_rows = len(slots)
        host, on_device = self._slots[bucket]
        host[:n_rows], host[n_rows:] = slots, SCRATCH
        on_device.update_inplace(host)
        if begin:
            host, on_device = self._images[bucket]
            start = 0
            for first, n_images in stretches(places_of(begin)):
                host[start : start + n_images] = self._pictures[first : first + n_images]
                start += n_images
            on_device.update_inplace(host)
        binding, options, logits = self._programs[stage, bucket]
        self.sessions[stage].run_with_iobinding(binding, options)  # returns when the device is done
        on_host = self._on_host.get((stage, bucket))
        if on_host is not None:
            on_host.update_inplace(logits)
        return np.array((on_host or logits).numpy()[:n_rows]), None  # a copy: in host memory `numpy` is a view

    def _stage_logits(self, stage: int, bucket: int) -> None:
        """Have logits copied to one pinned array if ONNX Runtime can; otherwise `numpy` makes a new array each time."""
        logits = self._programs[stage, bucket][2]
        on_host = ort.OrtValue.ortvalue_from_numpy(
            self._staging.array(logits.shape(), self._stages[stage].outputs[0].dtype)
        )
        try:
            on_host.update_inplace(logits)
        except Exception as error:  # ONNX Runtime raises one type per status, with no common base
            logger.info("logits are not copied to pinned memory: %s", error)
            return
        if np.array_equal(on_host.numpy(), logits.numpy(), equal_nan=True):
            self._on_host[stage, bucket] = on_host

    def _bind(self, stage: int, bucket: int) -> tuple[Any, Any, Any]:
        """Return what runs a stage at a bucket: the binding, run options, and the tensor that receives the logits."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(bucket))  # one graph per bucket; 0 is ONNX Runtime's default
        first = self._stages[stage].outputs[0]
        logits = self._tensor((bucket, *first.shape), first.dtype)
        session = self.sessions[stage]
        binding = session.io_binding()
        inputs = {store(name): value for name, value in self._stores.items()} | {SLOTS: self._slots[bucket][1]}
        inputs[self._image.name] = self._images[bucket][1]
        for argument in session.get_inputs():
            binding.bind_ortvalue_input(argument.name, inputs[argument.name])
        outputs = {stored(name): value for name, value in self._stores.items()} | {first.name: logits}
        for argument in session.get_outputs():
            binding.bind_ortvalue_output(argument.name, outputs[argument.name])
        return binding, options, logits

    def _tensor(self, shape: Sequence[int], dtype: str) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype), self._kind)


class _OwnThread:
    """A thread that runs functions in order. It ends once nothing refers to this object.

    It is a daemon, unlike the threads of a pool, so that the process can end even if the device hangs.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._calls,), name="exitserve-onnx-lane", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def run(self, function: Callable[[], T]) -> T:
        """Run a function on the thread and wait for it; returns or raises what the function does."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        try:
            return future.result()
        finally:
            del future  # else an error's traceback and the future keep each other alive, with all objects of the call


def _work(calls: "SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]") -> None:
    while (call := calls.get()) is not None:
        function, future = call
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
        del call, function, future  # else they would keep the lane alive while this waits for the next call
