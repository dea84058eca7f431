"""The contract between the engine and the runners that execute its stages."""

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


def require_finite(stage: int, logits: NDArray[np.float32]) -> None:
    """Check the logits of a blank image, from a warm-up: a stage that gives NaN for it would do so for every image.

    Raises:
        RunnerError: they are not all finite.
    """
    if not np.isfinite(logits).all():
        raise RunnerError(
            f"stage {stage + 1} gives logits that are not finite for a blank image: export the bundle again, from "
            "finite weights"
        )


@dataclass(frozen=True, slots=True)
class Heads:
    """What a runner computed from the logits on its device: arrays [rows]."""

    classes: NDArray[np.int64]  # the leading class
    confidences: NDArray[np.float64]  # its softmax output
    scores: NDArray[np.float64]  # the bundle's exit score


NO_LOGITS = np.zeros((0, 0), np.float32)


@dataclass(frozen=True, slots=True)
class StageOutput:
    """The result of one run: the logits of the stage's exit, float32 [rows, classes], and its rows' next state.

    `logits` may be `NO_LOGITS` if the caller did not want them and the runner computed `heads`.
    """

    logits: NDArray[np.float32]
    block: Block  # row i's state is `RowState(block, i)`; without values after the last stage
    seconds: float  # wall time of the run, gathering included
    copy_seconds: float = 0.0  # of these, spent copying rows that were not adjacent
    heads: Heads | None = None

    @property
    def states(self) -> list[RowState]:
        return self.block.states(range(self.block.n_rows))


class Runner(Protocol):
    """Runs batches, each of one stage. Stages are counted from 0.

    `run` may be called from `n_lanes` threads at once. A row's logits do not depend on the other rows of its batch.
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
        """Run every stage, so that no request pays for first runs; returns seconds by batch rows, per stage.

        Takes about `limit_s`, but always runs a few rows through every stage. Any thread that may call `run`.
        """
        ...


@runtime_checkable
class PreparingRunner(Runner, Protocol):
    """A runner that gathers a batch's rows in a separate step, so that its lane can act before it runs them."""

    def prepare(self, stage: int, rows: Sequence[RowState]) -> Callable[[], StageOutput]:
        """Gather the rows. Call the result once, on the same thread and before the next `prepare`, to run them."""
        ...


class Pending(Protocol):
    """A batch that runs on a device, or is queued there behind another."""

    def has_run(self) -> bool:
        """Whether the batch is complete, so that `collect` does not wait."""
        ...

    def collect(self) -> StageOutput:
        """Wait for the batch and return its result; call once.

        Raises:
            RunnerError: it failed.
        """
        ...


@runtime_checkable
class LaunchingRunner(Runner, Protocol):
    """A runner whose device has the next batch queued before the current one has run, so it never waits for Python."""

    @property
    def runs_ahead(self) -> bool:
        """Whether batches run asynchronously, so that the engine's thread may launch them. A launch takes microseconds,
        except for images that must first be copied to a canvas (`canvas_px_of`)."""
        ...

    def launch(self, stage: int, rows: Sequence[RowState], behind: Any = None, with_logits: bool = True) -> Pending:
        """Launch a batch, `behind` one that was launched before and is collected before this one.

        Args:
            with_logits: False if the logits are not read; see `StageOutput`.
        """
        ...


@runtime_checkable
class BulkRunner(Runner, Protocol):
    """A runner that accepts many images at once, faster than one by one."""

    def first_states(self, images: NDArray[np.uint8], which: Sequence[int]) -> Sequence[RowState]:
        """`first_state` of some of the images [any, H, W, 3]."""
        ...


def first_states_of(runner: Runner) -> Callable[[NDArray[np.uint8], Sequence[int]], Sequence[RowState]]:
    """Return `Runner.first_state` for several images [any, H, W, 3] at once, in bulk if the runner supports it."""
    if isinstance(runner, BulkRunner):
        return runner.first_states
    return lambda images, which: [runner.first_state(images[i]) for i in which]


def canvas_px_of(runner: Runner) -> int:
    """The largest side of images that a runner scales to the network's size itself; 0 if it scales none."""
    return getattr(runner, "canvas_px", 0)
