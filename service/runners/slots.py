"""The places that a row in flight has on the host and on the device, and the batch sizes prepared there.

A row has a *picture place* on the host from when it is submitted until the engine has taken the result of its first
stage, which may have to rerun before that. It has a *slot* on the device from the start of that stage until nothing
refers to its state any more.
"""

from threading import Lock
from typing import Any, Final

from service.runners.base import RunnerError
from service.runners.blocks import NO_VALUES, RowState

SCRATCH: Final = 0  # the slot of no row: padding that fills a bucket reads and writes there
NOWHERE: Final = -1


class SlotState(RowState):
    """A row's state, the same object through all stages. Its deletion, on whichever thread, frees its places.

    Attributes:
        slot: an int, `SCRATCH` before the first stage.
        place: where its picture is, an int; `NOWHERE` if it has none, or no longer has one.
        keeps_picture: whether it keeps its picture for life, because its first stage runs more than once: if its first
            batch hangs, say, that one may still read the picture.
    """

    __slots__ = ("_slots", "keeps_picture", "place", "slot")
    # Any, so that the compiled class stores Python objects: a C int would be boxed anew for each list it goes into.
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
    """Slots 1 to `n_slots`, and as many picture places. Any thread may call this: each step is atomic.

    Picture places are given out round a ring. Pictures that arrive in succession are therefore adjacent, and a batch of
    them is sent in one or two copies, in whatever order earlier ones have left.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        # A stack: what the slot freed last holds may still be in a cache.
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
        """Return the state of a new row, with a picture place if `has_place`.

        Raises:
            RunnerError: no picture place is free.
        """
        return self.admit_all(1)[0] if has_place else SlotState(self, NOWHERE)

    def admit_all(self, n_rows: int) -> list[SlotState]:
        """Return the states of new rows, each with a picture place.

        Raises:
            RunnerError: too few places are free; none is taken.
        """
        with self._admitting:
            places = self._take_places(n_rows)
        return [SlotState(self, place) for place in places]

    def _take_places(self, n_rows: int) -> list[Any]:
        taken, place, n_slots = self._taken, self._next_place, self.n_slots
        end = place + n_rows
        if end < n_slots and not any(taken[place:end]):  # the usual case
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
            raise RunnerError(f"all {self.n_slots} picture places are taken: {MORE_IN_FLIGHT}")
        return places

    def begin(self, states: list[SlotState]) -> None:
        """Give a slot to each row whose first stage is about to run. A row that reruns keeps its own.

        Raises:
            RunnerError: too few are free; rows that have already got one keep it.
        """
        for state in states:
            if state.slot:
                state.keeps_picture = True
                continue
            try:
                state.slot = self.free.pop()
            except IndexError:
                raise RunnerError(
                    f"{len(states)} images start, but fewer of the {self.n_slots} slots are free: {MORE_IN_FLIGHT}"
                ) from None

    def leave(self, state: SlotState) -> None:
        place: int = state.place
        if place != NOWHERE:
            self._taken[place], state.place = False, NOWHERE
        state.block = NO_VALUES


def slots_of(states: list[SlotState]) -> list[int]:
    """The slots of rows. Like all loops over every row of a batch, it is in this module, which can be compiled."""
    return [state.slot for state in states]


def places_of(states: list[SlotState]) -> list[int]:
    return [state.place for state in states]


MORE_IN_FLIGHT = "more images are in flight than the runner was made for"


def stretches(places: list[int]) -> list[tuple[int, int]]:
    """Split places into runs of consecutive ones, (first, length) each."""
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
