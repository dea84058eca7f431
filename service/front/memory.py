"""What the engine's process and the workers share: the images, and a few numbers.

It is memory without a name (memfd): the kernel frees it with the last process that has it open, however that ends, and
it does not count against the size of /dev/shm, which is small in containers.

    board | one region a worker: its images in flight, its tally | one arena a worker: slots of an image each
"""

import mmap
import os
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from service.tally import Tally, tally_bytes

PAGE_BYTES = 4096
TEXT_BYTES = 1024
TEXT_AT = 256  # within the board


@dataclass(frozen=True, slots=True)
class Layout:
    """How much of what: all that both ends have to agree on."""

    n_workers: int
    n_slots: int  # a worker
    height_px: int
    width_px: int
    n_exits: int

    @property
    def image_bytes(self) -> int:
        return self.height_px * self.width_px * 3

    @property
    def region_bytes(self) -> int:
        return _pages(8 + tally_bytes(self.n_exits))

    @property
    def arena_bytes(self) -> int:
        return _pages(self.n_slots * self.image_bytes)

    @property
    def total_bytes(self) -> int:
        return PAGE_BYTES + self.n_workers * (self.region_bytes + self.arena_bytes)


class SharedMemory:
    """A mapping of it. Every number has one writer, and is eight bytes, which are read whole.

    Args:
        layout: the same everywhere.
        descriptor: of memory that another process has made; owned by this from now on.
    """

    def __init__(self, layout: Layout, descriptor: int) -> None:
        self.layout = layout
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, layout.total_bytes)
        self._view = memoryview(self._map)
        self.board = Board(self._view[:PAGE_BYTES])
        self._in_flight = [self._region(i)[:8].cast("q") for i in range(layout.n_workers)]

    @classmethod
    def create(cls, layout: Layout) -> Self:
        """Make it, all zero. Pages are taken from the machine when they are first written to."""
        descriptor = os.memfd_create("exitserve", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, layout.total_bytes)
        return cls(layout, descriptor)

    def _region(self, worker: int) -> memoryview:
        start = PAGE_BYTES + worker * self.layout.region_bytes
        return self._view[start : start + self.layout.region_bytes]

    @property
    def in_flight_rows(self) -> int:
        """Images handed to the engine, of all workers."""
        return sum(cell[0] for cell in self._in_flight)

    def in_flight_of(self, worker: int) -> int:
        return self._in_flight[worker][0]

    def set_in_flight(self, worker: int, n_rows: int) -> None:
        """Only the worker itself does, and the engine's process once it has died."""
        self._in_flight[worker][0] = n_rows

    def tally(self, worker: int) -> Tally:
        n_bytes = tally_bytes(self.layout.n_exits)
        return Tally(self.layout.n_exits, self._region(worker)[8 : 8 + n_bytes])

    def slots(self, worker: int) -> NDArray[np.uint8]:
        """A worker's images, uint8 [n_slots, height_px, width_px, 3]."""
        layout = self.layout
        start = PAGE_BYTES + layout.n_workers * layout.region_bytes + worker * layout.arena_bytes
        n_bytes = layout.n_slots * layout.image_bytes
        pixels = np.frombuffer(self._view[start : start + n_bytes], np.uint8)
        return pixels.reshape(layout.n_slots, layout.height_px, layout.width_px, 3)


class Board:
    """How the engine is doing, written by its process alone and read by workers without asking."""

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
        """Predicted wait for each image in flight."""
        return self._row_s[0]


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
