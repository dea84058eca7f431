"""Between the event loop and the engine's thread: one wake-up brings the answers of a whole batch."""

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.types import Receive

from service.engine import Engine
from service.rows import Answer, Options, Outcome, Sink

# A client that waits this long is watched for hanging up; sooner, the watching would cost more than the work.
PATIENCE_S = 0.05


class ClientLeft(Exception):  # noqa: N818 (nobody's error)
    """The client hung up before its answer; the engine has been told."""


class Delivery:
    """Submits images from the event loop and resolves its futures there."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        # One object for all requests: the engine groups outcomes by it.
        self._sink: Sink = self._hand_over

    async def classify(self, image: NDArray[np.uint8], options: Options, receive: Receive) -> Answer:
        """Return the engine's answer for an image, uint8 [H, W, 3].

        Args:
            receive: of the request, whose body has been read: its next message can only be the client's leaving.

        Raises:
            ClientLeft: the client hung up; the image runs no further stage.
            EngineError: overloaded, stopping, or the image failed.
        """
        loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        request = self.engine.submit_to(self._sink, future, image, options)
        watch = _Watch(receive, future)
        timer = loop.call_later(PATIENCE_S, watch.start)
        try:
            return await future
        except asyncio.CancelledError:
            self.engine.abandon(request)
            if watch.client_left:
                raise ClientLeft from None
            raise
        finally:
            timer.cancel()
            watch.stop()

    def _hand_over(self, outcomes: list[tuple[Any, Outcome]]) -> None:
        """On the engine's thread: wake the event loop, once for all of them."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _resolve(outcomes: list[tuple[Any, Outcome]]) -> None:
    for future, outcome in outcomes:
        if future.done():  # its client has left
            continue
        if isinstance(outcome, Answer):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)


class _Watch:
    """Waits for one client to leave, and then cancels what it waits for."""

    def __init__(self, receive: Receive, future: "asyncio.Future[Answer]") -> None:
        self._receive = receive
        self._future = future
        self._task: asyncio.Task[None] | None = None
        self.client_left = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._wait())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.client_left = True
        self._future.cancel()
