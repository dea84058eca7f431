"""Slots: a row's place on the device from its first stage to its answer.

Every value that a later stage reads has one tensor [slots, ...]; a row has the same slot in all of them. A stage
gathers what it reads by the rows' slots and writes what it makes to the same slots, so regrouping copies nothing, and
what a stage does not read stays where it is.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from service.runners.base import RunnerError

SCRATCH = 0  # nobody's slot: what fills a bucket up is read from there and written there


class Slot:
    """One row's place. It is free again when the last reference to this object goes, on whichever thread."""

    __slots__ = ("_free", "index")

    def __init__(self, index: int, free: "deque[int]") -> None:
        self.index = index
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.index)


class Slots:
    """Hands out slots 1 to `n_slots`; slot 0 is `SCRATCH`. Any thread: a deque's ends are atomic."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._free = deque(range(1, n_slots + 1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self, n_rows: int) -> list[Slot]:
        """Take slots for rows that start.

        Raises:
            RunnerError: there are too few; none is taken.
        """
        try:
            # Each is an object at once, so that those taken are given back if the rest is not there.
            return [Slot(self._free.popleft(), self._free) for _ in range(n_rows)]
        except IndexError:
            raise RunnerError(
                f"{n_rows} images start, and fewer of the {self.n_slots} slots on the device are free: more images are "
                "in work than the runner was made for"
            ) from None


class Values:
    """What rows keep in their slots, by name.

    Maps lie as [slots, height, width, channels]: so rows are runs of memory whatever a device's gather does with
    strides, and what is gathered is channels-last as it lies.

    Args:
        examples: of every value, [rows, ...]; shape, type and device count.
    """

    def __init__(self, examples: Mapping[str, Tensor], n_slots: int) -> None:
        self._stores = {
            name: torch.zeros(
                (1 + n_slots, *_channels_last(example).shape[1:]), dtype=example.dtype, device=example.device
            )
            for name, example in examples.items()
        }

    @property
    def bytes(self) -> int:
        return sum(store.nbytes for store in self._stores.values())

    def row_bytes(self, name: str) -> int:
        return self._stores[name][0].nbytes

    def __contains__(self, name: str) -> bool:
        return name in self._stores

    def gather(self, names: Sequence[str], slots: Tensor) -> list[Tensor]:
        """Return values of the rows in `slots` (int64 [rows], on the device), in that order."""
        return [_channels_second(self._stores[name].index_select(0, slots)) for name in names]

    def scatter(self, values: Mapping[str, Tensor], slots: Tensor) -> None:
        """Write values of the rows in `slots`; slots are distinct, but for `SCRATCH`."""
        for name, value in values.items():
            self._stores[name].index_copy_(0, slots, _channels_last(value))


def _channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.ndim == 4 else value


def _channels_second(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.ndim == 4 else value
