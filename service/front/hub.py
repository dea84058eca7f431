"""The engine process's end of all worker channels: submits the workers' images and returns the engine's outcomes.

One thread reads; the engine's thread writes outcomes to the worker that submitted the image. Neither blocks on a
worker: what a socket cannot take yet stays buffered in its channel, bounded by the worker's number of slots.
"""

import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Any

from service.budget.target import Keeper
from service.engine.engine import Engine
from service.engine.rows import Request, Told
from service.errors import EngineError
from service.front import wire
from service.front.calls import reply_to
from service.front.channel import Channel
from service.front.memory import SharedMemory, picture_in
from service.front.wire import Kind
from service.metrics import Metrics

logger = logging.getLogger(__name__)

PUBLISH_EVERY_S = 0.1  # longest delay until workers see that the engine is in trouble


class Link:
    """One worker process, from its start to its death. Its slots outlive it.

    Args:
        worker: its index, from 0.
        channel: the channel to it.
        on_unsent: called, on any thread, when the channel holds data that the socket did not take.
    """

    def __init__(
        self, worker: int, channel: Channel, memory: SharedMemory, engine: Engine, on_unsent: Callable[["Link"], None]
    ) -> None:
        self.worker = worker
        self.channel = channel
        self._engine = engine
        self._slots, self._images = list(memory.slots(worker)), memory.images(worker)
        # By slot, the latest request with its number. It may have ended: abandoning it then does nothing.
        self._requests: list[tuple[int, Request] | None] = [None] * len(self._slots)
        self._on_unsent = on_unsent
        self._sink = self._deliver  # one object: the engine groups outcomes by it

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        if not self.channel.send(kind, payload):
            self._on_unsent(self)

    # --- the hub's thread ---------------------------------------------------------------------------------------

    def submit(self, payload: bytes) -> None:
        refused: list[tuple[int, Told]] = []
        n_slots = len(self._slots)
        for options, size, numbers in wire.submissions(payload):
            if size == wire.OWN_SIZE:
                which = [number % n_slots for number in numbers]
                entries = self._engine.submit_all(self._sink, numbers, self._images, which, options)
                for slot, number, entry in zip(which, numbers, entries, strict=True):
                    if isinstance(entry, Request):
                        self._requests[slot] = number, entry
                    else:
                        refused.append((number, entry))
                continue
            for number in numbers:
                slot = number % n_slots
                picture = picture_in(self._slots[slot], *size)
                try:
                    request = self._engine.submit_to(self._sink, number, picture, options, False)
                    self._requests[slot] = number, request
                except EngineError as error:
                    refused.append((number, error))
                except ValueError as error:  # not a valid image for the network: fail this one only
                    logger.exception("an image of HTTP worker %d cannot be submitted", self.worker + 1)
                    refused.append((number, EngineError(str(error))))
        self._engine.flush()
        if refused:
            self._deliver(refused)

    def abandon(self, payload: bytes) -> None:
        for number in wire.numbers(payload):
            entry = self._requests[number % len(self._slots)]
            if entry is not None and entry[0] == number:
                self._engine.abandon(entry[1])
        # The engine's thread handles this after the abandonments: from then on the slots are unused, or read only by
        # batches whose outcome for these requests is dropped.
        self._engine.ask(partial(self.send, Kind.RELEASED, payload))

    def give_up(self, then: Callable[[], object]) -> None:
        """After the worker's death: abandon all its requests, and call `then` once the engine has released them."""
        for entry in self._requests:
            if entry is not None:
                self._engine.abandon(entry[1])
        self._engine.ask(then)

    # --- the engine's thread, or the hub's ----------------------------------------------------------------------

    def _deliver(self, outcomes: list[tuple[Any, Told]]) -> None:
        requests = self._requests
        for number, outcome in outcomes:
            if wire.is_last(outcome):
                requests[number % len(requests)] = None  # drop the reference
        if not self.channel.is_closed:
            self.send(Kind.TOLD, wire.pack_told(outcomes))


class Hub:
    """Connects the engine with all HTTP workers, over one `Link` each.

    Args:
        engine: started and stopped by the caller.
        metrics, keeper: answer the workers' calls.
        memory: shared with the workers.
        on_serving: called with a worker's index once it serves, on any thread of this process.
        on_gone: likewise, with the index and the number of requests in flight, once a worker has died and the engine
            has released its requests.
        on_broken: called if the hub's thread fails: no worker is served any more.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        keeper: Keeper,
        memory: SharedMemory,
        on_serving: Callable[[int], object],
        on_gone: Callable[[int, int], object],
        on_broken: Callable[[Exception], object],
    ) -> None:
        self._engine, self._metrics, self._keeper, self._memory = engine, metrics, keeper, memory
        self._on_serving, self._on_gone, self._on_broken = on_serving, on_gone, on_broken
        self._links: dict[int, Link] = {}
        self._tasks: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._selector = DefaultSelector()
        self._selector.register(self._woken, EVENT_READ)
        self._callers = ThreadPoolExecutor(1, thread_name_prefix="front-calls")
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="front-hub", daemon=True)

    # --- any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.publish()
        self._callers.submit(lambda: None)  # starts its thread: a shortage of threads later must not cost a worker
        self._thread.start()

    def attach(self, worker: int, sock: socket.socket) -> None:
        """Begin to serve a newly started worker over its socket."""
        link = Link(worker, Channel(sock), self._memory, self._engine, self._watch_for_room)
        self._links[worker] = link
        self._do(partial(self._selector.register, link.channel, EVENT_READ, link))

    def tell(self, worker: int, kind: Kind, text: str = "") -> None:
        """Send a worker a message; does nothing if it has died."""
        link = self._links.get(worker)
        if link is not None:
            link.send(kind, text.encode())

    def publish(self) -> None:
        """Write the engine's state to the shared board."""
        engine = self._engine
        self._memory.board.publish(engine.is_alive, engine.trouble, *engine.room)

    def stop(self) -> None:
        """Stop the threads and close all channels; further calls do nothing."""
        if self._stopping:
            return
        self._stopping = True
        self._do(lambda: None)
        self._thread.join()
        self._callers.shutdown(wait=False, cancel_futures=True)
        for link in self._links.values():
            link.channel.close()
        self._selector.close()
        self._waker.close()
        self._woken.close()

    def _do(self, task: Callable[[], object]) -> None:
        """Run something on the hub's thread."""
        self._tasks.put(task)
        with suppress(BlockingIOError):  # wake-ups are already pending
            self._waker.send(b"\0")

    def _watch_for_room(self, link: Link) -> None:
        self._do(partial(self._set_events, link, EVENT_READ | EVENT_WRITE))

    # --- the hub's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._serve_links()
        except Exception as error:  # all workers depend on this thread: it must not die silently
            logger.exception("the hub of the HTTP workers failed")
            self._on_broken(error)

    def _serve_links(self) -> None:
        while not self._stopping:
            for key, events in self._selector.select(PUBLISH_EVERY_S):
                link: Link | None = key.data
                if link is None:
                    self._run_tasks()
                    continue
                if events & EVENT_WRITE and link.channel.flush():
                    self._set_events(link, EVENT_READ)
                if events & EVENT_READ:
                    try:
                        self._read(link)
                    except Exception:  # one faulty worker must not affect the others
                        logger.exception("invalid message from HTTP worker %d: closing its channel", link.worker + 1)
                        self._lose(link)
            self.publish()

    def _run_tasks(self) -> None:
        self._woken.recv(4096)
        while not self._tasks.empty():
            self._tasks.get()()

    def _set_events(self, link: Link, events: int) -> None:
        if self._links.get(link.worker) is link:
            self._selector.modify(link.channel, events, link)

    def _read(self, link: Link) -> None:
        for kind, payload in link.channel.receive():
            if kind == Kind.SUBMIT:
                link.submit(payload)
            elif kind == Kind.ABANDON:
                link.abandon(payload)
            elif kind == Kind.TOOK:
                for seconds in wire.seconds(payload):
                    self._engine.took(seconds)
            elif kind == Kind.CALL:
                self._callers.submit(self._answer, link, payload)
            elif kind == Kind.SERVING:
                self._on_serving(link.worker)
        if link.channel.is_closed:
            self._lose(link)

    def _lose(self, link: Link) -> None:
        worker = link.worker
        del self._links[worker]
        self._selector.unregister(link.channel)
        link.channel.close()
        n_lost = self._memory.in_flight_of(worker)
        self._memory.set_connections(worker, None)

        def let_go() -> None:
            self._memory.set_in_flight(worker, 0)
            self._on_gone(worker, n_lost)

        link.give_up(let_go)

    # --- the thread for calls -----------------------------------------------------------------------------------

    def _answer(self, link: Link, payload: bytes) -> None:
        link.send(Kind.REPLY, reply_to(payload, self._metrics, self._keeper))
