"""What an engine asks of whatever runs its stages, and how the state of a row is referred to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class RunnerError(RuntimeError):
    """A runner cannot be made or cannot run; the message names the cause and the fix."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Values of rows that ran together, by name, each [n_rows, ...]. Never written to once made."""

    values: Mapping[str, Array]
    n_rows: int

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())


@dataclass(frozen=True, slots=True)
class RowState:
    """One row's state: a reference, so that regrouping moves nothing until a batch is gathered."""

    block: Block
    index: int


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What one run gives: the logits of the stage's exit, float32 [rows, classes], and what its rows go on with."""

    logits: NDArray[np.float32]
    block: Block  # row i's state is `RowState(block, i)`; without values after the last stage
    seconds: float  # wall time of the run, gathering included

    @property
    def states(self) -> list[RowState]:
        return [RowState(self.block, i) for i in range(self.block.n_rows)]


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

    def warm_up(self) -> Sequence[Mapping[int, float]]:
        """Run every stage, so that no request pays for first runs; returns the seconds by batch rows, per stage."""
        ...


def fit_stage_time(seconds_by_rows: Mapping[int, float]) -> tuple[float, float]:
    """Fit t(rows) = fixed + per_row x rows through the smallest and the largest batch; returns (fixed_s, per_row_s)."""
    fewest, most = min(seconds_by_rows), max(seconds_by_rows)
    if fewest == most:
        return 0.0, seconds_by_rows[most] / most
    per_row = max(0.0, (seconds_by_rows[most] - seconds_by_rows[fewest]) / (most - fewest))
    return max(0.0, seconds_by_rows[most] - per_row * most), per_row


def consecutive(indices: Sequence[int]) -> bool:
    return all(b - a == 1 for a, b in pairwise(indices))


def gather(rows: Sequence[RowState], name: str, out: Array | None = None) -> Array:
    """Return one value of several rows as a batch, copying each row once at most.

    Rows that stand side by side in one block are returned as they are, a view; all others are gathered into `out`
    [len(rows), ...], or into a new array.
    """
    runs = _runs(rows)
    if len(runs) == 1 and consecutive(runs[0][1]):
        block, indices = runs[0]
        return block.values[name][indices[0] : indices[-1] + 1]
    sample = rows[0].block.values[name]
    if out is None:
        out = np.empty((len(rows), *sample.shape[1:]), sample.dtype)
    start = 0
    for block, indices in runs:
        part = out[start : start + len(indices)]
        if consecutive(indices):
            part[...] = block.values[name][indices[0] : indices[-1] + 1]
        else:
            # Any other mode than "clip" goes through a buffer, a second copy.
            np.take(block.values[name], indices, axis=0, out=part, mode="clip")
        start += len(indices)
    return out


def _runs(rows: Sequence[RowState]) -> list[tuple[Block, list[int]]]:
    """Split rows into stretches of one block, in order."""
    runs: list[tuple[Block, list[int]]] = []
    for row in rows:
        if runs and runs[-1][0] is row.block:
            runs[-1][1].append(row.index)
        else:
            runs.append((row.block, [row.index]))
    return runs


def keep(block: Block, indices: Sequence[int], max_waste: float = 4.0) -> list[RowState]:
    """Return the states of some rows of a block, having bounded the memory that they keep alive.

    Rows that are `max_waste` times fewer than the block's get one of their own. That copies few rows; where more are
    left, the block is kept and each is copied once, when it runs.
    """
    if block.n_rows < max_waste * len(indices):
        return [RowState(block, i) for i in indices]
    own = Block({name: value[list(indices)] for name, value in block.values.items()}, len(indices))
    return [RowState(own, i) for i in range(len(indices))]
