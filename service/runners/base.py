"""What an engine asks of whatever runs its stages, and how the state of a row is referred to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class RunnerError(RuntimeError):
    """A runner cannot be made or cannot run; the message names the cause and the fix."""


class FatalRunnerError(RunnerError):
    """A runner can never run again in this process: its device is lost. Only a new process helps."""


# Not frozen, as nothing here that is made for every image: that takes three times as long.
@dataclass(slots=True, eq=False)
class Block:
    """Values of rows that ran together, by name, each [n_rows, ...]. Never written to once made.

    Runners that keep values on a device give every row a slot there, which is the row's own until nothing refers to its
    state; that stays the same object then, from the first stage to the last.
    """

    values: Mapping[str, Array]
    n_rows: int
    slots: "Sequence[RowState] | None" = None

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())

    @property
    def is_kept_in_slots(self) -> bool:
        """Its rows have all they have in their slots: their states stay what they are."""
        return self.slots is not None and not self.values

    def states(self, indices: Iterable[int]) -> list["RowState"]:
        """References to some of its rows."""
        slots = self.slots
        return [RowState(self, i) for i in indices] if slots is None else [slots[i] for i in indices]


@dataclass(slots=True)
class RowState:
    """One row's state: a reference, so that regrouping moves nothing until a batch is gathered."""

    block: Block
    index: int


NO_VALUES = Block({}, 1)
"""What a row has that keeps all it has in its slot."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What a runner has worked out of logits itself, on its device: [rows] each."""

    classes: NDArray[np.int64]  # the leading class
    confidences: NDArray[np.float64]  # its softmax output
    scores: NDArray[np.float64]  # as the bundle's own score gives them


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What one run gives: the logits of the stage's exit, float32 [rows, classes], and what its rows go on with."""

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

    def collect(self) -> StageOutput:
        """Wait for it, once.

        Raises:
            RunnerError: it failed.
        """
        ...


@runtime_checkable
class LaunchingRunner(Runner, Protocol):
    """A runner whose device has the next batch before this one has run, so that it never waits for Python."""

    def launch(self, stage: int, rows: Sequence[RowState], behind: Any = None) -> Pending:
        """Have a batch run, `behind` one that the same thread has launched before and collects before this one."""
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


class Gathering:
    """The rows of a batch as the blocks they are, or as stretches of those they lie in, found once for all values."""

    def __init__(self, rows: Sequence[RowState]) -> None:
        self.n_rows = len(rows)
        self._singles = [row.block for row in rows if row.block.n_rows == 1]
        self.copies = self.n_rows > 1
        if len(self._singles) == self.n_rows:
            return
        self._stretches: list[tuple[Block, list[int] | slice]] = []
        indices: list[int] = []
        block = None
        for row in rows:
            if row.block is not block:
                indices, block = [], row.block
                self._stretches.append((block, indices))
            indices.append(row.index)
        self._stretches = [(block, _as_slice(indices)) for block, indices in self._stretches]
        self.copies = len(self._stretches) > 1 or not isinstance(self._stretches[0][1], slice)

    def take(self, name: str, out: Array | None = None) -> Array:
        """Return one value of all rows as a batch, copying each row once at most.

        Rows that stand side by side in one block are returned as they are, a view; all others are gathered into `out`
        [n_rows, ...], or into a new array.
        """
        if len(self._singles) == self.n_rows:  # images, above all
            blocks = [block.values[name] for block in self._singles]
            return np.concatenate(blocks, out=out) if self.copies else blocks[0]
        first, indices = self._stretches[0]
        if len(self._stretches) == 1 and isinstance(indices, slice):
            return first.values[name][indices]
        if out is None:
            out = np.empty((self.n_rows, *first.values[name].shape[1:]), first.values[name].dtype)
        start = 0
        for block, indices in self._stretches:
            if isinstance(indices, slice):
                end = start + indices.stop - indices.start
                out[start:end] = block.values[name][indices]
            else:
                end = start + len(indices)
                # Any other mode than "clip" goes through a buffer, a second copy.
                np.take(block.values[name], indices, axis=0, out=out[start:end], mode="clip")
            start = end
        return out


def canvas_px_of(runner: Runner) -> int:
    """Up to which side a runner takes pictures of other sizes than the network's, which few do; 0: it takes none."""
    return getattr(runner, "canvas_px", 0)


def _as_slice(indices: list[int] | slice) -> list[int] | slice:
    """Rows that stand side by side as a slice, others as they are."""
    if isinstance(indices, slice) or indices != list(range(indices[0], indices[0] + len(indices))):
        return indices
    return slice(indices[0], indices[0] + len(indices))


def lie_side_by_side(rows: Sequence[RowState]) -> bool:
    """Whether rows, in this order, can run together without being copied."""
    first = rows[0]
    return all(row.block is first.block and row.index == first.index + i for i, row in enumerate(rows))


def keep(block: Block, indices: Sequence[int], max_waste: float = 4.0) -> list[RowState]:
    """Return the states of some rows of a block, having bounded the memory that they keep alive.

    Rows that are `max_waste` times fewer than the block's get one of their own. That copies few rows; where more are
    left, the block is kept and each is copied once, when it runs. A block with slots is not, as a slot is to be free as
    soon as its row has left.
    """
    if block.slots is not None:
        states = block.states(indices)
        for state, i in zip(states, indices, strict=True):
            state.block = Block({name: value[i : i + 1] for name, value in block.values.items()}, 1)
        return states
    if block.n_rows < max_waste * len(indices):
        return block.states(indices)
    own = Block({name: value[list(indices)] for name, value in block.values.items()}, len(indices))
    return own.states(range(own.n_rows))
