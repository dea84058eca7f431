"""References to the state of rows, so that regrouping copies nothing, and gathering rows into a batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FEW: Final = 4  # see `keep`


# Neither dataclass is frozen: they are made for every image, and making a frozen one takes three times as long.
@dataclass(slots=True, eq=False)
class Block:
    """The values of rows that ran together, by name, each [n_rows, ...]. They are never written to afterwards.

    Runners that keep values on a device give each row a slot there. `slots` are then the states of the rows, each the
    same object from the first stage to the last; a row's slot is freed when nothing refers to its state any more.
    """

    values: Mapping[str, Array]
    n_rows: int
    slots: "Sequence[RowState] | None" = None

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())

    @property
    def is_kept_in_slots(self) -> bool:
        """Whether all values of its rows are in their slots, so that their states need no change."""
        return self.slots is not None and not self.values

    def states(self, indices: Iterable[int]) -> list["RowState"]:
        """The states of some of its rows."""
        slots = self.slots
        return [RowState(self, i) for i in indices] if slots is None else [slots[i] for i in indices]


@dataclass(slots=True)
class RowState:
    """One row's state: a reference, so that regrouping moves nothing until a batch is gathered."""

    block: Block
    index: int

    def begun(self) -> None:
        """The engine has taken the result of the first stage, which will not rerun: free what only that stage reads."""


NO_VALUES: Final = Block({}, 1)
"""The block of a row whose values are all in its slot."""


class Gathering:
    """Gathers the values of a batch. Which rows are adjacent in one block is worked out once, for all values."""

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
        """Return one value of all rows as a batch [n_rows, ...], copying each row at most once.

        If all rows are adjacent in one block, the result is a view of it. Otherwise they are gathered into `out`
        [n_rows, ...], or into a new array.
        """
        if len(self._singles) == self.n_rows:  # mostly images
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
                # Any mode but "clip" copies through a buffer, which is a second copy.
                np.take(block.values[name], indices, axis=0, out=out[start:end], mode="clip")
            start = end
        return out


def _as_slice(indices: list[int] | slice) -> list[int] | slice:
    """A slice if the rows are adjacent and in order, else the indices."""
    if isinstance(indices, slice) or indices != list(range(indices[0], indices[0] + len(indices))):
        return indices
    return slice(indices[0], indices[0] + len(indices))


def lie_side_by_side(rows: Sequence[RowState]) -> bool:
    """Whether rows, in this order, are adjacent in one block, so that they run together without being copied."""
    first = rows[0]
    return all(row.block is first.block and row.index == first.index + i for i, row in enumerate(rows))


def keep(block: Block, indices: Sequence[int]) -> list[RowState]:
    """Return states of some rows of a block such that they keep only a bounded amount of its memory alive.

    If they are at most one in `FEW` of the block's rows, they are copied to a block of their own: few copies. If
    more are kept, they stay in the block, and each is copied once, when it runs. Rows with slots never keep the block
    alive, as it refers to the states of all its rows and a slot must be free as soon as its row has left.
    """
    if block.slots is not None:
        states = block.states(indices)
        for state, i in zip(states, indices, strict=True):
            state.block = Block({name: value[i : i + 1] for name, value in block.values.items()}, 1)
        return states
    if block.n_rows < FEW * len(indices):
        return block.states(indices)
    own = Block({name: value[list(indices)] for name, value in block.values.items()}, len(indices))
    return own.states(range(own.n_rows))
