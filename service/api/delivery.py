"""Between the event loop and the engine's thread: one wake-up brings the answers of a whole batch."""

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

# A client that waits this long is watched for hanging up; sooner, the watching would cost more than the work.
PATIENCE_S = 0.05


class Delivery:
    """Submits images from the event loop, and has each told there what becomes of it: tokens are what is called."""

    def __init__(self, engine: EnginePort) -> None:
        self.engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sink: Sink = self._hand_over  # one object: the engine groups outcomes by it

    async def classify(self, image: NDArray[np.uint8], options: Options, receive: Receive) -> Answer:
        """Return the engine's answer for an image, uint8 [H, W, 3].

        Args:
            receive: of the request, whose body has been read: its next message can only be the client's leaving.

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
        """The same without a watch over the client; cancelling gives the image up."""
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
        """Yield what every head says of an image, and at last its answer; `options.steps` has to be set.

        To be closed (`contextlib.aclosing`) by whoever does not read to the end: the image is given up then. Raises as
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
        """On the engine's thread: wake the event loop, once for all of them."""
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
    """Waits, while it is entered, for one client to leave, and then calls `on_leave`."""

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
