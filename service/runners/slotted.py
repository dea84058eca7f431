"""What runners have in common that keep the state of rows on a device: slots, buckets, and lanes that take turns."""

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
MANY_NUMBERS = 32_768  # in a picture
SWITCH_S = 0.001  # after which a thread that works passes the interpreter on; Python's own are 5 ms


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A batch on a lane.

    Attributes:
        collect: waits for it and gives logits, float32 [rows, classes], and what else is told of the rows; the caller's
            own. It is to be called before the batch after the next is launched, in their order.
        has_run: whether there is nothing to wait for any more; always true where it runs while it is collected.
    """

    collect: Callable[[], tuple[NDArray[np.float32], Heads | None]]
    has_run: Callable[[], bool] = lambda: True


class Lane(Protocol):
    """Runs batches one after the other."""

    def prepare(self, stage: int, bucket: int) -> None:
        """Make ready for batches of up to `bucket` rows, and run one whose rows are all `SCRATCH`."""
        ...

    def launch(
        self, stage: int, bucket: int, slots: list[int], begin: list[SlotState], with_logits: bool = True
    ) -> Running:
        """Have a stage run on the rows in `slots`, up to `bucket`; `begin` are those whose pictures it needs.

        Without logits these may be `NO_LOGITS`, if all else is told.
        """
        ...


L = TypeVar("L", bound=Lane)


class Launched:
    """A batch that a lane runs, or will run once the one before it has run.

    Attributes:
        is_last: none was launched behind it: its lane is idle when it is collected.
        running: what the lane says of it.
    """

    def __init__(self, runner: "SlotRunner[Any]", lane: Any, stage: int, rows: list[SlotState]) -> None:
        self.lane, self.is_last = lane, True
        self.running: Running
        self._runner, self._stage, self._rows = runner, stage, rows
        self._started_s = time.perf_counter()

    def has_run(self) -> bool:
        return self.running.has_run()

    def collect(self) -> StageOutput:
        """Wait for it; to be called once."""
        runner, stage, rows = self._runner, self._stage, self._rows
        try:
            logits, heads = self.running.collect()
        except Exception as error:  # as at the launch
            raise runner.failure(stage, len(rows), error) from error
        finally:
            if self.is_last:
                runner.make_idle(self.lane)
        goes_on = stage + 1 < runner.n_stages
        block = Block({}, len(rows), rows if goes_on else None)
        return StageOutput(logits, block, time.perf_counter() - self._started_s, heads=heads)


class SlotRunner(ABC, Generic[L]):
    """See `base.Runner` for the contract.

    Whoever makes one calls `_open_lanes` when all that lanes need is there.

    Args:
        n_stages: of the network.
        image_shape, image_dtype: of what `first_state` takes.
        max_rows: the largest batch; less where the device's memory ends before, see `warm_up`.
        max_in_flight_rows: images in work at once; each has a slot on the device.
        n_lanes: batches at once.

    Attributes:
        pictures: [places, *image_shape], of rows that have not begun: written as they come, so that a lane has a batch
            of them in one piece.
        runs_ahead: see `base.LaunchingRunner`.
        is_on_gpu: whoever launches needs the interpreter back as soon as a batch has run, or the GPU idles: so Python
            passes it on every `SWITCH_S`, in the whole process.

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
        # Beside the images in work, those of the batches that lanes run for nobody, or have run last.
        self.slots = Slots(max_in_flight_rows + 2 * n_lanes * max_rows)
        self.pictures: Array = self._allocate((self.slots.n_slots, *image_shape))
        self._numbers = self.pictures.reshape(-1).data  # of all pictures, one after the other
        self.lanes: list[L] = []
        self._idle: SimpleQueue[L] = SimpleQueue()
        self._prepared = False

    @abstractmethod
    def _open_lane(self) -> L: ...

    @abstractmethod
    def _is_lost(self, error: Exception) -> bool:
        """After an error: can nothing run on the device any more, in this process?"""

    def _is_out_of_memory(self, error: Exception) -> bool:
        return is_out_of_memory(error)

    def _release_memory(self) -> None:
        """Give unused memory back to the device, so that a smaller try finds it."""

    def _allocate(self, shape: Sequence[int]) -> Array:
        """Memory on the host for pictures."""
        return np.zeros(shape, self.image_dtype)

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def first_state(self, image: Array) -> SlotState:
        if image.shape != self.image_shape or image.dtype != self.image_dtype:
            wanted = f"{self.image_dtype} {self.image_shape}"
            raise ValueError(f"an image {image.dtype} {image.shape} where the network takes {wanted}")
        state = self.slots.admit()
        n_numbers, place = image.size, state.place
        if n_numbers > MANY_NUMBERS:
            self.pictures[place] = image
        else:
            # Numpy would let others have the interpreter, for a copy that is over before they have it.
            self._numbers[place * n_numbers : (place + 1) * n_numbers] = image.reshape(-1).data
        return state

    def first_states(self, images: Array, which: Sequence[int]) -> list[SlotState]:
        """`first_state` of some of the images [any, *image_shape], copied together."""
        if images.shape[1:] != self.image_shape or images.dtype != self.image_dtype:
            wanted = f"{self.image_dtype} {self.image_shape}"
            raise ValueError(f"images {images.dtype} {images.shape[1:]} where the network takes {wanted}")
        states = self.slots.admit_all(len(which))
        start = 0
        for first, n_rows in stretches(places_of(states)):
            self._copy(images, which[start : start + n_rows], self.pictures[first : first + n_rows])
            start += n_rows
        return states

    def _copy(self, images: Array, which: Sequence[int], there: Array) -> None:
        """Some of the images to where they belong."""
        runs = stretches(list(which))
        if len(runs) == 1:
            there[:] = images[runs[0][0] : runs[0][0] + runs[0][1]]
        elif images.flags.c_contiguous:
            # Any other mode than "clip" goes through a buffer, a second copy.
            np.take(images, which, axis=0, out=there, mode="clip")
        else:
            there[:] = images[which]  # `take` would make a contiguous copy of all first

    def run(self, stage: int, rows: Sequence[RowState]) -> StageOutput:
        return self.launch(stage, rows).collect()

    def launch(
        self, stage: int, rows: Sequence[RowState], behind: "Launched | None" = None, with_logits: bool = True
    ) -> "Launched":
        """Have a batch run: on an idle lane, or on that of a batch launched before, `behind` which it waits there.

        Raises:
            RunnerError: it is too large, or cannot be launched.
        """
        if len(rows) > self.max_rows:
            raise RunnerError(f"stage {stage + 1} was given {len(rows)} images at once and takes {self.max_rows}")
        states = list(cast(Sequence[SlotState], rows))  # of `first_state`, as the contract has it
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
        """Prepare every stage at every bucket, the first time; then run every stage at all buckets for `limit_s`.

        Where the memory of the device ends, `max_rows` is halved, with a warning.

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
            for row in rows:
                row.keeps_picture = True
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
            # Here, not where the error was caught: it held on to all that its call had allocated.
            self.lanes.clear()
            self._idle = SimpleQueue()
            self._release_memory()
            too_many = self.buckets.pop()
            if not self.buckets:
                raise RunnerError(f"the device has no memory for single images: {why}")
            logger.warning("no memory for %d images at once, at most %d run together: %s", too_many, self.max_rows, why)
            self._open_lanes()
        if self.is_on_gpu:
            sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        self._prepared = True

    def _out_of_memory_at(self) -> str | None:
        """Prepare all stages at all buckets; returns None, or what was said where the memory ended."""
        try:
            for lane in self.lanes:
                for bucket in reversed(self.buckets):  # so that smaller ones find their memory in the pool
                    for stage in range(self.n_stages):
                        lane.prepare(stage, bucket)
        except Exception as error:  # as above
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
