"""The common part of runners that keep the state of rows on a device: slots, buckets, and a queue of idle lanes."""

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from service.runners.base import FatalRunnerError, Heads, RunnerError, StageOutput
from service.runners.blocks import Array, Block, RowState
from service.runners.limits import is_out_of_memory, words_of
from service.runners.slots import Slots, SlotState, buckets_for, places_of, slots_of, stretches

logger = logging.getLogger(__name__)

IMAGES = "images"
REPEATS = 3
DEFAULT_LANES = 2  # while the results of one lane are copied, the other's batch runs
MANY_NUMBERS = 32_768  # in a picture; above it, numpy copies it
SWITCH_S = 0.001  # after which Python makes a running thread release the interpreter; its default is 5 ms


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A batch on a lane.

    Attributes:
        collect: waits for the batch; returns its logits, float32 [rows, classes], and what the device computed from
            them. Both are the caller's own. Call it in launch order, and before the next batch but one is launched.
        has_run: whether the batch is complete; always true if it only runs when it is collected.
    """

    collect: Callable[[], tuple[NDArray[np.float32], Heads | None]]
    has_run: Callable[[], bool] = lambda: True


class Lane(Protocol):
    """Runs batches one after the other."""

    def prepare(self, stage: int, bucket: int) -> None:
        """Prepare a stage for batches of up to `bucket` rows, and run one whose rows are all `SCRATCH`."""
        ...

    def launch(
        self, stage: int, bucket: int, slots: list[int], begin: list[SlotState], with_logits: bool = True
    ) -> Running:
        """Launch a stage on the rows in `slots`, at most `bucket`; `begin` has the rows if the stage reads pictures.

        Without `with_logits`, the result's logits may be `NO_LOGITS` if it has heads.
        """
        ...


L = TypeVar("L", bound=Lane)


class Launched:
    """A batch that a lane runs, or will run once the one before it has run.

    Attributes:
        is_last: no batch was launched behind it, so its lane is idle once it is collected.
        running: the lane's handle on it.
    """

    def __init__(self, runner: "SlotRunner[Any]", lane: Any, stage: int, rows: list[SlotState]) -> None:
        self.lane, self.is_last = lane, True
        self.running: Running
        self._runner, self._stage, self._rows = runner, stage, rows
        self._started_s = time.perf_counter()

    def has_run(self) -> bool:
        return self.running.has_run()

    def collect(self) -> StageOutput:
        """See `base.Pending`."""
        runner, stage, rows = self._runner, self._stage, self._rows
        try:
            logits, heads = self.running.collect()
        except Exception as error:  # as in `SlotRunner.launch`
            raise runner.failure(stage, len(rows), error) from error
        finally:
            if self.is_last:
                runner.make_idle(self.lane)
        goes_on = stage + 1 < runner.n_stages
        block = Block({}, len(rows), rows if goes_on else None)
        return StageOutput(logits, block, time.perf_counter() - self._started_s, heads=heads)


class SlotRunner(ABC, Generic[L]):
    """See `base.Runner` for the contract.

    A subclass calls `_open_lanes` at the end of its `__init__`, once everything that lanes need exists.

    Args:
        n_stages: of the network.
        image_shape, image_dtype: of the images that `first_state` takes.
        max_rows: the largest batch; `warm_up` lowers it if the device has too little memory.
        max_in_flight_rows: images in flight at once; each has a slot on the device.
        n_lanes: batches at once.

    Attributes:
        pictures: images [places, *image_shape] of rows whose first stage has not run. They are written on arrival, so
            that those of a batch are mostly adjacent.
        runs_ahead: see `base.LaunchingRunner`.
        is_on_gpu: whether stages run on a GPU. It idles if the thread that launches waits for the interpreter after a
            batch, so warm-up sets the interpreter's switch interval to `SWITCH_S`, in the whole process.

    Raises:
        RunnerError: a number is out of range.
    """

    runs_ahead = False
    is_on_gpu = False

    def __init__(
        self,
        n_stages: int,
        image_shape: Sequence[int],
        image_dtype: str,
        max_rows: int,
        max_in_flight_rows: int,
        n_lanes: int,
    ) -> None:
        if max_rows < 1 or n_lanes < 1:
            raise RunnerError(f"max_rows ({max_rows}) and n_lanes ({n_lanes}) must be at least 1")
        self.n_stages, self.n_lanes = n_stages, n_lanes
        self.image_shape, self.image_dtype = tuple(image_shape), np.dtype(image_dtype)
        self.buckets = buckets_for(max_rows)
        # Two batches per lane more than are in flight: a lane may still run rows given up, or refer to rows answered.
        self.slots = Slots(max_in_flight_rows + 2 * n_lanes * max_rows)
        self.pictures: Array = self._allocate((self.slots.n_slots, *image_shape))
        self._numbers = self.pictures.reshape(-1).data  # of all pictures, flat
        self.lanes: list[L] = []
        self._idle: SimpleQueue[L] = SimpleQueue()
        self._prepared = False

    @abstractmethod
    def _open_lane(self) -> L: ...

    @abstractmethod
    def _is_lost(self, error: Exception) -> bool:
        """Whether, after an error, nothing can run on the device any more in this process."""

    def _is_out_of_memory(self, error: Exception) -> bool:
        return is_out_of_memory(error)

    def _release_memory(self) -> None:
        """Return unused memory to the device, so that an attempt with smaller batches finds it."""

    def _allocate(self, shape: Sequence[int]) -> Array:
        """Allocate zeros on the host for pictures."""
        return np.zeros(shape, self.image_dtype)

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def first_state(self, image: Array) -> SlotState:
        if image.shape != self.image_shape or image.dtype != self.image_dtype:
            wanted = f"{self.image_dtype} {self.image_shape}"
            raise ValueError(f"the image is {image.dtype} {image.shape}, but the network takes {wanted}")
        state = self.slots.admit()
        n_numbers, place = image.size, state.place
        if n_numbers > MANY_NUMBERS:
            self.pictures[place] = image
        else:
            # Numpy would release the interpreter lock, and getting it back takes longer than so small a copy.
            self._numbers[place * n_numbers : (place + 1) * n_numbers] = image.reshape(-1).data
        return state

    def first_states(self, images: Array, which: Sequence[int]) -> list[SlotState]:
        """`first_state` of some of the images [any, *image_shape], copied together."""
        if images.shape[1:] != self.image_shape or images.dtype != self.image_dtype:
            wanted = f"{self.image_dtype} {self.image_shape}"
            raise ValueError(f"the images are {images.dtype} {images.shape[1:]}, but the network takes {wanted}")
        states = self.slots.admit_all(len(which))
        start = 0
        for first, n_rows in stretches(places_of(states)):
            self._copy(images, which[start : start + n_rows], self.pictures[first : first + n_rows])
            start += n_rows
        return states

    def _copy(self, images: Array, which: Sequence[int], out: Array) -> None:
        """Copy some of the images to adjacent places."""
        runs = stretches(list(which))
        if len(runs) == 1:
            out[:] = images[runs[0][0] : runs[0][0] + runs[0][1]]
        elif images.flags.c_contiguous:
            # Any mode but "clip" copies through a buffer, which is a second copy.
            np.take(images, which, axis=0, out=out, mode="clip")
        else:
            out[:] = images[which]  # `take` would first make a contiguous copy of all images

    def run(self, stage: int, rows: Sequence[RowState]) -> StageOutput:
        return self.launch(stage, rows).collect()

    def launch(
        self, stage: int, rows: Sequence[RowState], behind: "Launched | None" = None, with_logits: bool = True
    ) -> "Launched":
        """Launch a batch: on an idle lane, which may have to be waited for, or on the lane of the batch `behind`.

        Raises:
            RunnerError: the batch is too large, or cannot be launched.
        """
        if len(rows) > self.max_rows:
            raise RunnerError(f"stage {stage + 1} got {len(rows)} images at once, but takes at most {self.max_rows}")
        states = list(cast(Sequence[SlotState], rows))  # rows come from `first_state`
        begin = states if stage == 0 else []
        if begin:
            self.slots.begin(begin)
        slots = slots_of(states)
        bucket = next(size for size in self.buckets if size >= len(rows))
        lane = self._idle.get() if behind is None else behind.lane
        launched = Launched(self, lane, stage, states)
        try:
            launched.running = lane.launch(stage, bucket, slots, begin, with_logits)
        except Exception as error:  # torch and ONNX Runtime raise errors of many kinds
            if behind is None:
                self._idle.put(lane)
            raise self.failure(stage, len(rows), error) from error
        if behind is not None:
            behind.is_last = False
        return launched

    def failure(self, stage: int, n_rows: int, error: Exception) -> RunnerError:
        kind = FatalRunnerError if self._is_lost(error) else RunnerError
        return kind(f"stage {stage + 1} failed on a batch of {n_rows}: {words_of(error)}")

    def make_idle(self, lane: L) -> None:
        self._idle.put(lane)

    def warm_up(self, limit_s: float = 1.0) -> Sequence[Mapping[int, float]]:
        """On the first call, prepare every stage at every bucket. Then run all stages at each bucket, for `limit_s`.

        If the device's memory runs out, the largest bucket is dropped, with a warning, and preparation starts again.

        Raises:
            RunnerError: not even single images can be run.
        """
        if not self._prepared:
            self._prepare()
        times: list[dict[int, float]] = [{} for _ in range(self.n_stages)]
        spent_s = 0.0
        for bucket in self.buckets:
            blank = np.zeros(self.image_shape, self.image_dtype)
            rows = [self.first_state(blank) for _ in range(bucket)]
            for stage in range(self.n_stages):
                seconds = []
                for _ in range(REPEATS):
                    output = self.run(stage, rows)
                    seconds.append(output.seconds)
                times[stage][bucket] = min(seconds)
                spent_s += sum(seconds)
            if spent_s > limit_s:
                break
        return times

    def _prepare(self) -> None:
        while (why := self._out_of_memory_at()) is not None:
            # Not where the error is caught: its traceback keeps alive all that the failed call had allocated.
            self.lanes.clear()
            self._idle = SimpleQueue()
            self._release_memory()
            too_many = self.buckets.pop()
            if not self.buckets:
                raise RunnerError(f"the device has too little memory even for single images: {why}")
            logger.warning("too little memory for %d images at once; now at most %d: %s", too_many, self.max_rows, why)
            self._open_lanes()
        if self.is_on_gpu:
            sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        self._prepared = True

    def _out_of_memory_at(self) -> str | None:
        """Prepare all stages at all buckets; returns None, or the error's message if memory ran out."""
        try:
            for lane in self.lanes:
                for bucket in reversed(self.buckets):  # largest first: smaller ones reuse its memory from the pool
                    for stage in range(self.n_stages):
                        lane.prepare(stage, bucket)
        except Exception as error:  # as in `launch`
            if self._is_out_of_memory(error):
                return words_of(error)
            what = f"the stages cannot be prepared: {words_of(error)}"
            raise (FatalRunnerError if self._is_lost(error) else RunnerError)(what) from error
        return None

    def _open_lanes(self) -> None:
        for _ in range(self.n_lanes):
            lane = self._open_lane()
            self.lanes.append(lane)
            self._idle.put(lane)
