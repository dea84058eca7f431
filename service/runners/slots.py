"""A row's places while it is in work on a device, and the batch sizes that are prepared there.

A row has a *picture place* on the host from the moment it is submitted until the engine has taken what came of its
first stage, which may have to run again before that; and a *slot* on the device from the start of that stage until
nobody refers to its state any more.
"""

from threading import Lock
from typing import Any, Final

from service.runners.base import RunnerError
from service.runners.blocks import NO_VALUES, RowState

SCRATCH: Final = 0  # nobody's slot: what fills a bucket up is read from there and written there
NOWHERE: Final = -1


class SlotState(RowState):
    """A row's state, the same object through all stages. When it goes, on whichever thread, its places are free.

    Attributes:
        slot: an int, `SCRATCH` before the first stage.
        place: of its picture, an int; `NOWHERE` where it has none, or none any more.
        keeps_picture: as long as it lives itself, since its first stage runs more than once: its batch has hung, say,
            and may still read the picture.
    """

    __slots__ = ("_slots", "keeps_picture", "place", "slot")
    # Kept as Python's objects, which lists of them are made of: compiled, an int would be made anew for each list.
    slot: Any
    place: Any

    def __init__(self, slots: "Slots", place: Any) -> None:
        self.block, self.index = NO_VALUES, 0
        self._slots, self.place = slots, place
        self.slot, self.keeps_picture = SCRATCH, False

    def begun(self) -> None:
        if not self.keeps_picture:
            self._slots.leave(self)

    def __del__(self) -> None:
        if self.slot:
            self._slots.free.append(self.slot)
        place: int = self.place
        if place != NOWHERE:
            self._slots.leave(self)


class Slots:
    """Slots 1 to `n_slots`, `SCRATCH` aside, and as many picture places. Any thread: each step is atomic.

    Picture places are given out in a ring, so that pictures that come one after the other lie side by side and a batch
    of them is sent in one copy or two, in whatever order earlier ones have left.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        # The last one is the next: what lay there last may be in a cache.
        self.free: list[Any] = list(range(n_slots, 0, -1))
        self._taken = [False] * n_slots  # picture places
        self._next_place = 0
        self._admitting = Lock()

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
        return self.admit_all(1)[0] if has_place else SlotState(self, NOWHERE)

    def admit_all(self, n_rows: int) -> list[SlotState]:
        """New rows, each with a picture place.

        Raises:
            RunnerError: so many are not free.
        """
        with self._admitting:
            places = self._take_places(n_rows)
        return [SlotState(self, place) for place in places]

    def _take_places(self, n_rows: int) -> list[Any]:
        taken, place, n_slots = self._taken, self._next_place, self.n_slots
        end = place + n_rows
        if end < n_slots and not any(taken[place:end]):  # mostly
            taken[place:end] = [True] * n_rows
            self._next_place = end
            return list(range(place, end))
        places: list[Any] = []
        n_left = n_rows
        for _ in range(n_slots):
            if not n_left:
                break
            if not taken[place]:
                taken[place] = True
                places.append(place)
                n_left -= 1
            place += 1
            if place == n_slots:
                place = 0
        self._next_place = place
        if len(places) < n_rows:
            for place in places:
                taken[place] = False
            raise RunnerError(f"all {self.n_slots} picture places are taken: {MORE_IN_WORK}")
        return places

    def begin(self, states: list[SlotState]) -> None:
        """Give slots to rows whose first stage is to run.

        Raises:
            RunnerError: there are too few; whoever has got one keeps it.
        """
        for state in states:
            if state.slot:
                state.keeps_picture = True
                continue
            try:
                state.slot = self.free.pop()
            except IndexError:
                raise RunnerError(
                    f"{len(states)} images start, and fewer of the {self.n_slots} slots are free: {MORE_IN_WORK}"
                ) from None

    def leave(self, state: SlotState) -> None:
        place: int = state.place
        if place != NOWHERE:
            self._taken[place], state.place = False, NOWHERE
        state.block = NO_VALUES


def slots_of(states: list[SlotState]) -> list[int]:
    """Here, with all else that looks at every row of a batch, as this module can be compiled."""
    return [state.slot for state in states]


def places_of(states: list[SlotState]) -> list[int]:
    return [state.place for state in states]


MORE_IN_WORK = "more images are in work than the runner was made for"


def stretches(places: list[int]) -> list[tuple[int, int]]:
    """Places as stretches (first, length) of such that follow each other."""
    found: list[tuple[int, int]] = []
    first = end = places[0]
    for place in places:
        if place != end:
            found.append((first, end - first))
            first = end = place
        end += 1
    found.append((first, end - first))
    return found


def buckets_for(max_rows: int) -> list[int]:
    """The batch sizes that are prepared: powers of two, and `max_rows`."""
    return sorted({1 << i for i in range(max_rows.bit_length())} | {max_rows})
