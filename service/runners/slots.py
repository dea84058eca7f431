"""A row's places while it is in work on a device, and the batch sizes that are prepared there.

A row has a *picture place* on the host from the moment it is submitted until its first stage has run, and a *slot* on
the device from the start of that stage until nobody refers to its state any more.
"""

from collections import deque
from collections.abc import Sequence
from itertools import count

from service.runners.base import RunnerError
from service.runners.blocks import NO_VALUES, RowState

SCRATCH = 0  # nobody's slot: what fills a bucket up is read from there and written there
NOWHERE = -1


class SlotState(RowState):
    """A row's state, the same object through all stages. When it goes, on whichever thread, its places are free.

    Attributes:
        slot: `SCRATCH` before the first stage.
        place: of its picture; `NOWHERE` where it has none, or none any more.
        keeps_picture: as long as it lives itself, since its first stage runs more than once: its batch has hung, say,
            and may still read the picture.
    """

    __slots__ = ("_slots", "keeps_picture", "place", "slot")

    def __init__(self, slots: "Slots", place: int) -> None:
        self.block, self.index = NO_VALUES, 0
        self._slots, self.place = slots, place
        self.slot, self.keeps_picture = SCRATCH, False

    def __del__(self) -> None:
        if self.slot:
            self._slots.free.append(self.slot)
        if self.place >= 0:
            self._slots.leave(self)


class Slots:
    """Slots 1 to `n_slots`, `SCRATCH` aside, and as many picture places. Any thread: each step is atomic.

    Picture places are given out in a ring, so that pictures that come one after the other lie side by side and a batch
    of them is sent in one copy or two, in whatever order earlier ones have left.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.free = deque(range(1, n_slots + 1))
        self._taken = bytearray(n_slots)  # picture places
        self._next = count()

    @property
    def n_free(self) -> int:
        return len(self.free)

    @property
    def n_places_taken(self) -> int:
        return sum(self._taken)

    def admit(self, has_place: bool = True) -> SlotState:
        """A new row, with a picture place if it is to have one.

        Raises:
            RunnerError: none is free.
        """
        if not has_place:
            return SlotState(self, NOWHERE)
        taken, n_places = self._taken, self.n_slots
        for _ in range(n_places):
            place = next(self._next) % n_places
            if not taken[place]:
                taken[place] = 1
                return SlotState(self, place)
        raise RunnerError(f"all {n_places} picture places are taken: {MORE_IN_WORK}")

    def begin(self, states: Sequence[SlotState]) -> None:
        """Give slots to rows whose first stage is to run.

        Raises:
            RunnerError: there are too few; whoever has got one keeps it.
        """
        for state in states:
            if state.slot:
                state.keeps_picture = True
                continue
            try:
                state.slot = self.free.popleft()
            except IndexError:
                raise RunnerError(
                    f"{len(states)} images start, and fewer of the {self.n_slots} slots are free: {MORE_IN_WORK}"
                ) from None

    def begun(self, states: Sequence[SlotState]) -> None:
        """The first stage of rows has run: their pictures are not needed any more."""
        for state in states:
            if not state.keeps_picture:
                self.leave(state)

    def leave(self, state: SlotState) -> None:
        place, state.place = state.place, NOWHERE
        if place >= 0:
            self._taken[place] = 0
        state.block = NO_VALUES


MORE_IN_WORK = "more images are in work than the runner was made for"


def stretches(places: Sequence[int]) -> list[tuple[int, int]]:
    """Picture places as stretches (first, length) of such that follow each other."""
    first, n_places = places[0], len(places)
    if places[-1] - first == n_places - 1 and places == list(range(first, first + n_places)):
        return [(first, n_places)]
    found: list[tuple[int, int]] = []
    for place in places:
        if found and place == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((place, 1))
    return found


def buckets_for(max_rows: int) -> list[int]:
    """The batch sizes that are prepared: powers of two, and `max_rows`."""
    return sorted({1 << i for i in range(max_rows.bit_length())} | {max_rows})
