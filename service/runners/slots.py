"""Slots: a row's place on a device from its first stage to its answer, and the batch sizes that are prepared there."""

from collections import deque

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


def buckets_for(max_rows: int) -> list[int]:
    """The batch sizes that are prepared: powers of two, and `max_rows`."""
    return sorted({1 << i for i in range(max_rows.bit_length())} | {max_rows})
