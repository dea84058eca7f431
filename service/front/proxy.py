"""The worker's proxy of the engine: implements `EnginePort` by messages, on the worker's event loop."""

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engine.rows import PLAIN, Options, Sink, Told
from service.errors import EngineError, EngineOverloaded
from service.front import wire
from service.front.calls import Calls, gone
from service.front.channel import Channel
from service.front.memory import SharedMemory, picture_in
from service.front.outbox import Outbox
from service.front.wire import Kind

TOOK_S = 0.02  # longest delay of reported answer times; they normally travel with other messages
# A frame of this many images is sent before the turn of the event loop ends: otherwise all images are with either the
# worker or the engine, and the other idles. Measured with one worker and 64 connections: 32 leave more of the cores
# idle, 8 take more of the engine's time.
FRAME_IMAGES = 16


@dataclass(slots=True, eq=False)
class Ticket:
    """A request at the engine. `token` is None once its client has left."""

    number: int
    sink: Sink
    token: Any


class RemoteEngine:
    """The engine, in another process. See `service.api.ports.EnginePort`. Usable once `attach` has been called.

    A submission is a request number, plus the image in a slot of shared memory. The submissions of one turn of the
    event loop are sent in one message or a few; the outcomes of one engine batch come back in one. A slot is free again
    with the request's last outcome or, if it was abandoned, once the engine reports that it has released it.

    Args:
        channel: to the engine's process.
        memory: shared with it.
        worker: this worker's index, from 0.
        class_names: by class id.
        on_drain: called when the engine's process asks the worker to drain.
        on_broken: called with the error when the engine has broken down or its process has died.
    """

    def __init__(
        self,
        channel: Channel,
        memory: SharedMemory,
        worker: int,
        class_names: Sequence[str],
        on_drain: Callable[[], object],
        on_broken: Callable[[Exception], object],
    ) -> None:
        self.calls = Calls(self._send_soon)
        self.outbox = Outbox()  # batches the responses written during one delivery of outcomes
        self._channel = channel
        self._memory = memory
        self._worker = worker
        self._board = memory.board
        self._class_names = class_names
        self._on_drain, self._on_broken = on_drain, on_broken
        self._slots, self._images = list(memory.slots(worker)), list(memory.images(worker))
        self._image_shape = self._images[0].shape
        # The next request number of each free slot; the lowest slots are used first, so that few pages are touched.
        self._free = list(range(len(self._slots)))[::-1]
        self._tickets: dict[int, Ticket] = {}  # by number
        self._submissions: list[tuple[int, Options, tuple[int, int]]] = []
        self._abandoned: list[int] = []
        self._took: list[float] = []
        self._flush_is_due = False
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- the port -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._started.wait()

    @property
    def is_connected(self) -> bool:
        """Whether the channel to the engine's process is open."""
        return not self._channel.is_closed

    @property
    def canvas_px(self) -> int:
        return self._memory.layout.canvas_px

    @property
    def is_alive(self) -> bool:
        return self._board.is_alive and self.is_connected

    @property
    def trouble(self) -> str | None:
        return self._board.trouble

    @property
    def room(self) -> tuple[int, float]:
        return self._board.room_rows, self._board.row_s

    @property
    def has_room(self) -> bool:
        return self._memory.in_flight_rows < self._board.room_rows and bool(self._free)

    def overload(self) -> EngineOverloaded:
        in_flight = self._memory.in_flight_rows
        return EngineOverloaded(in_flight, in_flight * self._board.row_s)

    def submit_to(
        self, sink: Sink, token: Any, image: NDArray[np.uint8], options: Options = PLAIN, flush: bool = True
    ) -> Ticket:
        if self._channel.is_closed:
            raise gone()
        if not self._free:
            raise self.overload()
        number = self._free[-1]
        slot = number % len(self._slots)
        if image.shape == self._image_shape:
            size = wire.OWN_SIZE
            self._images[slot][:] = image
        else:
            size = image.shape[0], image.shape[1]
            picture_in(self._slots[slot], *size)[:] = image
        self._free.pop()  # only now: an image that does not fit must not take a slot
        ticket = self._tickets[number] = Ticket(number, sink, token)
        self._submissions.append((number, options, size))
        self._note_in_flight()
        if len(self._submissions) >= FRAME_IMAGES:
            self.flush()
        elif flush:
            self._flush_soon()
        return ticket

    def took(self, seconds: float) -> None:
        if not self._took:
            assert self._loop is not None
            self._loop.call_later(TOOK_S, self.flush)
        self._took.append(seconds)

    def abandon(self, request: Ticket) -> None:
        if request.number in self._tickets and request.token is not None:
            request.token = None
            self._abandoned.append(request.number)
            self._flush_soon()

    def drain(self, timeout_s: float) -> bool:
        """Release what waits for the engine, without waiting: the server has already drained."""
        self._started.set()
        self.calls.close()
        return not self._tickets

    # --- the event loop -----------------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Exchange messages with the engine's process on this loop from now on."""
        self._loop = loop
        loop.add_reader(self._channel, self._read)
        self._read()  # messages that arrived earlier

    def say_serving(self) -> None:
        self._send(Kind.SERVING)

    def _note_in_flight(self) -> None:
        self._memory.set_in_flight(self._worker, len(self._tickets))

    def _flush_soon(self) -> None:
        if not self._flush_is_due:
            assert self._loop is not None
            self._flush_is_due = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        self._flush_is_due = False
        frames: list[tuple[int, bytes]] = []
        if self._submissions:
            frames.append((Kind.SUBMIT, wire.pack_submissions(self._submissions)))
            self._submissions.clear()
        if self._took:
            frames.append((Kind.TOOK, wire.pack_seconds(self._took)))
            self._took.clear()
        if self._abandoned:  # after the submissions that they may refer to
            frames.append((Kind.ABANDON, wire.pack_numbers(self._abandoned)))
            self._abandoned.clear()
        if frames:
            self._send_all(frames)

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        self._send_all([(kind, payload)])

    def _send_all(self, frames: list[tuple[int, bytes]]) -> None:
        if not self._channel.send_all(frames) and self._loop is not None:
            self._loop.add_writer(self._channel, self._send_rest)

    def _send_rest(self) -> None:
        if self._channel.flush() and self._loop is not None:
            self._loop.remove_writer(self._channel)

    def _send_soon(self, kind: Kind, payload: bytes) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._send, kind, payload)

    def _read(self) -> None:
        for kind, payload in self._channel.receive():
            if kind == Kind.TOLD:
                self._deliver(wire.told(payload, self._class_names))
            elif kind == Kind.RELEASED:
                for number in wire.numbers(payload):
                    self._release(number)
                self._note_in_flight()
            elif kind == Kind.REPLY:
                self.calls.take_reply(payload)
            elif kind == Kind.STARTED:
                self._started.set()
            elif kind == Kind.DRAIN:
                self._on_drain()
                self._started.set()  # `start` must not block on an engine that may never start
            elif kind == Kind.BROKEN:
                self._on_broken(EngineError(payload.decode()))
        if self._channel.is_closed:
            self._hang_up()

    def _deliver(self, items: Iterable[tuple[int, Told]]) -> None:
        by_sink: dict[Sink, list[tuple[Any, Told]]] = {}
        tickets = self._tickets
        for number, outcome in items:
            ticket = tickets.get(number)
            if ticket is None or ticket.token is None:
                continue  # abandoned: RELEASED frees its slot
            outcomes = by_sink.get(ticket.sink)
            if outcomes is None:
                outcomes = by_sink[ticket.sink] = []
            outcomes.append((ticket.token, outcome))
            if wire.is_last(outcome):
                self._release(number)
        self._note_in_flight()
        with self.outbox:
            for sink, outcomes in by_sink.items():
                sink(outcomes)

    def _release(self, number: int) -> None:
        del self._tickets[number]
        self._free.append(number + len(self._slots))

    def _hang_up(self) -> None:
        """The engine's process has died: fail all pending requests and calls, and end this process."""
        assert self._loop is not None
        self._loop.remove_reader(self._channel)
        self._loop.remove_writer(self._channel)
        self._channel.close()
        self.calls.close()
        self._started.set()
        for ticket in list(self._tickets.values()):
            if ticket.token is not None:
                ticket.sink([(ticket.token, gone())])
        self._on_broken(gone())
