"""Passes outcomes from the engine's thread to the event loop, with one wake-up for a whole batch."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service.api.ports import EnginePort
from service.engine.rows import Answer, Options, Sink, Step, Told

# Delay before a client is watched for disconnecting: for shorter requests the watch would cost more than it saves.
PATIENCE_S = 0.05


class Delivery:
    """Submits images from the event loop and receives their outcomes there; an image's token is its callback."""

    def __init__(self, engine: EnginePort) -> None:
        self.engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sink: Sink = self._hand_over  # one object: the engine groups outcomes by it

    async def classify(self, image: NDArray[np.uint8], options: Options, receive: Receive) -> Answer:
        """Return the engine's answer for an image, uint8 [H, W, 3].

        Args:
            receive: the request's ASGI channel. Its body has been read, so the next message can only be a disconnect.

        Raises:
            ClientDisconnect: the client hung up; the image runs no further stage.
            EngineError: overloaded, stopping, or the image failed.
        """
        task = asyncio.current_task()
        assert task is not None
        with Watch(receive, task.cancel) as watch:
            try:
                return await self.answer(image, options)
            except asyncio.CancelledError:
                if not watch.client_left:
                    raise
                task.uncancel()
                raise ClientDisconnect from None

    async def answer(self, image: NDArray[np.uint8], options: Options) -> Answer:
        """As `classify`, but without watching the client; cancellation abandons the image."""
        loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        request = self.engine.submit_to(self._sink, partial(_resolve, future), image, options)
        try:
            return await future
        except asyncio.CancelledError:
            self.engine.abandon(request)
            raise

    async def follow(
        self, image: NDArray[np.uint8], options: Options, receive: Receive
    ) -> AsyncIterator[Step | Answer]:
        """Yield the result of every head for an image, and finally its answer; `options.steps` must be set.

        Callers that may stop early must close it (`contextlib.aclosing`), which abandons the image. Raises as
        `classify` does.
        """
        self._loop = asyncio.get_running_loop()
        told: asyncio.Queue[Told | None] = asyncio.Queue()  # None: the client has left
        request = self.engine.submit_to(self._sink, told.put_nowait, image, options)
        ended = False
        try:
            with Watch(receive, lambda: told.put_nowait(None)):
                while not ended:
                    item = await told.get()
                    ended = item is not None and not isinstance(item, Step)
                    if item is None:
                        raise ClientDisconnect
                    if not isinstance(item, Step | Answer):
                        raise item
                    yield item
        finally:
            if not ended:
                self.engine.abandon(request)

    def _hand_over(self, outcomes: list[tuple[Any, Told]]) -> None:
        """The engine's sink, on its thread: wake the event loop once for all outcomes."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(_tell, outcomes)


def _tell(outcomes: list[tuple[Callable[[Told], object], Told]]) -> None:
    for tell, outcome in outcomes:
        tell(outcome)


def _resolve(future: "asyncio.Future[Answer]", outcome: Told) -> None:
    if future.done():  # its client has left
        return
    if isinstance(outcome, Answer):
        future.set_result(outcome)
    elif not isinstance(outcome, Step):
        future.set_exception(outcome)


class Watch:
    """A context in which a client's disconnect, noticed after `PATIENCE_S`, calls `on_leave`."""

    def __init__(self, receive: Receive, on_leave: Callable[[], object]) -> None:
        self._receive = receive
        self._on_leave = on_leave
        self._task: asyncio.Task[None] | None = None
        self.client_left = False

    def __enter__(self) -> Self:
        self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _start(self) -> None:
        self._task = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.client_left = True
        self._on_leave()
