"""The memory shared by the engine's process and the workers: images and a few counters.

It is anonymous (memfd): the kernel frees it with the last process that has it open, however that ends, and it does not
count against the size of /dev/shm, which is small in containers.

    board | per worker a region: images in flight, connections, beats, tally | per worker an arena: slots of one image
"""

import mmap
import os
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from service.tally import Tally, tally_bytes

PAGE_BYTES = 4096
TEXT_BYTES = 1024
TEXT_AT = 256  # within the board
COUNTS_BYTES = 24  # of a worker's region, before its tally


@dataclass(frozen=True, slots=True)
class Layout:
    """The dimensions that all processes must agree on."""

    n_workers: int
    n_slots: int  # per worker
    height_px: int
    width_px: int
    n_exits: int
    canvas_px: int = 0  # largest side of pictures of other sizes; 0: no room for them

    @property
    def slot_bytes(self) -> int:
        return 3 * max(self.height_px * self.width_px, self.canvas_px**2)

    @property
    def region_bytes(self) -> int:
        return _pages(COUNTS_BYTES + tally_bytes(self.n_exits))

    @property
    def arena_bytes(self) -> int:
        return _pages(self.n_slots * self.slot_bytes)

    @property
    def total_bytes(self) -> int:
        return PAGE_BYTES + self.n_workers * (self.region_bytes + self.arena_bytes)


class SharedMemory:
    """A process's mapping of the memory. Every counter has one writer, and is eight bytes, read atomically.

    Args:
        layout: the same in all processes.
        descriptor: of the memory, as made by `create`; owned by this from now on.
    """

    def __init__(self, layout: Layout, descriptor: int) -> None:
        self.layout = layout
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, layout.total_bytes)
        self._view = memoryview(self._map)
        self.board = Board(self._view[:PAGE_BYTES])
        counts = [self._region(i)[:COUNTS_BYTES] for i in range(layout.n_workers)]
        self._in_flight = [cells[:8].cast("q") for cells in counts]
        self._connections = [cells[8:16].cast("q") for cells in counts]  # plus one; 0 while not accepting
        self._beats = [cells[16:].cast("q") for cells in counts]

    @classmethod
    def create(cls, layout: Layout) -> Self:
        """Create it, zeroed. Pages are allocated when they are first written to."""
        descriptor = os.memfd_create("exitserve", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, layout.total_bytes)
        return cls(layout, descriptor)

    def with_canvas(self, canvas_px: int) -> Self:
        """Remap the memory with slots that hold pictures of this side; call before any slot is used."""
        layout = replace(self.layout, canvas_px=canvas_px)
        os.ftruncate(self.descriptor, layout.total_bytes)
        return type(self)(layout, self.descriptor)

    def _region(self, worker: int) -> memoryview:
        start = PAGE_BYTES + worker * self.layout.region_bytes
        return self._view[start : start + self.layout.region_bytes]

    @property
    def in_flight_rows(self) -> int:
        """Images submitted to the engine and not released, of all workers."""
        n_rows = 0
        for cell in self._in_flight:
            n_rows += cell[0]
        return n_rows

    def in_flight_of(self, worker: int) -> int:
        return self._in_flight[worker][0]

    def set_in_flight(self, worker: int, n_rows: int) -> None:
        """Called by the worker itself only, and by the engine's process once it has died."""
        self._in_flight[worker][0] = n_rows

    def set_connections(self, worker: int, n: int | None) -> None:
        """Set a worker's number of connections; None if it accepts none. Same writers as `set_in_flight`."""
        self._connections[worker][0] = 0 if n is None else n + 1

    def beats_of(self, worker: int) -> int:
        """How often a worker's event loop has said that it turns; 0 until it does."""
        return self._beats[worker][0]

    def set_beats(self, worker: int, n: int) -> None:
        """Same writers as `set_in_flight`."""
        self._beats[worker][0] = n

    def least_connections_beside(self, worker: int) -> int | None:
        """The fewest connections of any other worker that accepts; None if no other does."""
        others = (cell[0] for other, cell in enumerate(self._connections) if other != worker)
        return min((n - 1 for n in others if n), default=None)

    def tally(self, worker: int) -> Tally:
        """Counts of how a worker's requests ended. Same writers as `set_in_flight`."""
        end = COUNTS_BYTES + tally_bytes(self.layout.n_exits)
        return Tally(self.layout.n_exits, self._region(worker)[COUNTS_BYTES:end])

    def slots(self, worker: int) -> NDArray[np.uint8]:
        """A worker's slots, uint8 [n_slots, slot_bytes]; see `picture_in`."""
        layout = self.layout
        start = PAGE_BYTES + layout.n_workers * layout.region_bytes + worker * layout.arena_bytes
        n_bytes = layout.n_slots * layout.slot_bytes
        return np.frombuffer(self._view[start : start + n_bytes], np.uint8).reshape(layout.n_slots, layout.slot_bytes)

    def images(self, worker: int) -> NDArray[np.uint8]:
        """The slots, viewed as images of the network's size, uint8 [n_slots, height_px, width_px, 3]."""
        height_px, width_px = self.layout.height_px, self.layout.width_px
        own = self.slots(worker)[:, : 3 * height_px * width_px]
        return own.reshape(self.layout.n_slots, height_px, width_px, 3)


def picture_in(slot: NDArray[np.uint8], height_px: int, width_px: int) -> NDArray[np.uint8]:
    """A view of a slot as a picture, uint8 [height_px, width_px, 3]."""
    return slot[: 3 * height_px * width_px].reshape(height_px, width_px, 3)


class Board:
    """The engine's state, written by its process only, and read by workers without a message."""

    def __init__(self, memory: memoryview) -> None:
        self._flags = memory[:24].cast("q")  # alive, room_rows, bytes of the trouble or -1
        self._row_s = memory[24:32].cast("d")
        self._text = memory[TEXT_AT : TEXT_AT + TEXT_BYTES]

    def publish(self, is_alive: bool, trouble: str | None, room_rows: int, row_s: float) -> None:
        text = (trouble or "").encode()[:TEXT_BYTES]
        if text and self._text[: len(text)] != text:
            self._text[: len(text)] = text
        self._flags[2] = -1 if trouble is None else len(text)
        self._flags[0], self._flags[1] = is_alive, room_rows
        self._row_s[0] = row_s

    @property
    def is_alive(self) -> bool:
        return bool(self._flags[0])

    @property
    def trouble(self) -> str | None:
        n_bytes = self._flags[2]
        return None if n_bytes < 0 else bytes(self._text[:n_bytes]).decode(errors="replace")

    @property
    def room_rows(self) -> int:
        return self._flags[1]

    @property
    def row_s(self) -> float:
        """Predicted seconds of wait per image in flight."""
        return self._row_s[0]


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
