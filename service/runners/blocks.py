"""How the state of a row is referred to while it is regrouped, and how rows are brought together into a batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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

    def begun(self) -> None:
        """The engine has taken what came of its first stage, which will not run again: what that alone reads may go."""


NO_VALUES: Final = Block({}, 1)
"""What a row has that keeps all it has in its slot."""


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
