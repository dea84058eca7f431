"""What an engine asks of whatever runs its stages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from service.runners.blocks import Block, RowState


class RunnerError(RuntimeError):
    """A runner cannot be made or cannot run; the message names the cause and the fix."""


class FatalRunnerError(RunnerError):
    """A runner can never run again in this process: its device is lost. Only a new process helps."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What a runner has worked out of logits itself, on its device: [rows] each."""

    classes: NDArray[np.int64]  # the leading class
    confidences: NDArray[np.float64]  # its softmax output
    scores: NDArray[np.float64]  # as the bundle's own score gives them


NO_LOGITS = np.zeros((0, 0), np.float32)


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What one run gives: the logits of the stage's exit, float32 [rows, classes], and what its rows go on with.

    Where nobody wanted the logits and the runner has told `heads`, they may be `NO_LOGITS`.
    """

    logits: NDArray[np.float32]
    block: Block  # row i's state is `RowState(block, i)`; without values after the last stage
    seconds: float  # wall time of the run, gathering included
    copy_seconds: float = 0.0  # of these, to copy rows together that did not lie side by side
    heads: Heads | None = None

    @property
    def states(self) -> list[RowState]:
        return self.block.states(range(self.block.n_rows))


class Runner(Protocol):
    """Runs batches of one stage. Stages are counted from 0.

    `run` may be called from `n_lanes` threads at once. A row's logits do not depend on the rows beside it.
    """

    @property
    def n_stages(self) -> int: ...
    @property
    def n_lanes(self) -> int: ...
    @property
    def max_rows(self) -> int: ...

    def first_state(self, image: NDArray[np.uint8]) -> RowState:
        """The state of a row before stage 0, from uint8 [H, W, 3]. Any thread.

        Raises:
            ValueError: the image is not what the network takes.
        """
        ...

    def run(self, stage: int, rows: Sequence[RowState]) -> StageOutput:
        """Run one stage on 1 to `max_rows` rows.

        Raises:
            RunnerError: it failed; other batches are not affected.
        """
        ...

    def warm_up(self, limit_s: float = 1.0) -> Sequence[Mapping[int, float]]:
        """Run every stage, so that no request pays for first runs; returns the seconds by batch rows, per stage.

        Takes about `limit_s`, and a few rows through every stage at least. Any thread that may call `run`.
        """
        ...


@runtime_checkable
class PreparingRunner(Runner, Protocol):
    """A runner that gathers a batch's rows apart from running it, so that its lane has a moment in between."""

    def prepare(self, stage: int, rows: Sequence[RowState]) -> Callable[[], StageOutput]:
        """Gather the rows; what is returned runs them, once, on the same thread, before the next `prepare`."""
        ...


class Pending(Protocol):
    """A batch that runs on a device, or waits there for the one before it."""

    def has_run(self) -> bool:
        """Whether there is nothing to wait for any more."""
        ...

    def collect(self) -> StageOutput:
        """Wait for it, once.

        Raises:
            RunnerError: it failed.
        """
        ...


@runtime_checkable
class LaunchingRunner(Runner, Protocol):
    """A runner whose device has the next batch before this one has run, so that it never waits for Python."""

    @property
    def runs_ahead(self) -> bool:
        """Whether what was launched runs by itself, so that the engine's thread may launch. That takes microseconds,
        but for pictures that have to be laid out for it (`canvas_px_of`), which are copied."""
        ...

    def launch(self, stage: int, rows: Sequence[RowState], behind: Any = None, with_logits: bool = True) -> Pending:
        """Have a batch run, `behind` one that was launched before and is collected before this one.

        Args:
            with_logits: False where nobody reads them; see `StageOutput`.
        """
        ...


@runtime_checkable
class BulkRunner(Runner, Protocol):
    """A runner that takes many images at once in less time than one by one."""

    def first_states(self, images: NDArray[np.uint8], which: Sequence[int]) -> Sequence[RowState]:
        """`first_state` of some of the images [any, H, W, 3]."""
        ...


def first_states_of(runner: Runner) -> Callable[[NDArray[np.uint8], Sequence[int]], Sequence[RowState]]:
    """`Runner.first_state` for some images [any, H, W, 3] at once, in less time than one by one where it can that."""
    if isinstance(runner, BulkRunner):
        return runner.first_states
    return lambda images, which: [runner.first_state(images[i]) for i in which]


def canvas_px_of(runner: Runner) -> int:
    """Up to which side a runner takes pictures of other sizes than the network's, which few do; 0: it takes none."""
    return getattr(runner, "canvas_px", 0)
