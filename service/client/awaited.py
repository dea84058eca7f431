"""The asynchronous client."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from math import inf
from types import TracebackType
from typing import Any, Self, SupportsFloat, TypeVar, Unpack

import httpx

from service.api.answers import BatchAnswer, BudgetState, Classification, LastStep, ModelDescription, Readiness, Step
from service.client.calls import (
    CUT_OFF,
    DEFAULT_READY_S,
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    BudgetKind,
    Calls,
    M,
    Steps,
    Wishes,
    items,
)
from service.client.errors import Refused, ServerError
from service.client.patience import Patience
from service.client.pictures import Image

T = TypeVar("T")
# Limit on concurrent calls in httpx, which has this many connections. httpx would queue more calls itself, but with a
# timeout and in time quadratic in their number: of 1,500 calls to an idle server, none was answered in time.
MOST_AT_ONCE = 100


class AsyncClient(Calls):
    """`Client`, but asynchronous. Any number of calls may be made at once; those beyond `MOST_AT_ONCE` queue."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        retries: int = 0,
    ) -> None:
        super().__init__(url, token, timeout_s, retries)
        self._http = httpx.AsyncClient(**self._options)
        self._places = asyncio.Semaphore(MOST_AT_ONCE)

    async def classify(self, image: Image, **wishes: Unpack[Wishes]) -> Classification:
        return await self._ask(self._one("/classify", image, wishes), Classification)

    async def stream(self, image: Image, **wishes: Unpack[Wishes]) -> AsyncIterator[Step | LastStep]:
        call = self._one("/classify/stream", image, wishes)
        with self._explained():
            async with aclosing(await self._patiently(lambda: self._open(call), self._patience())) as response:
                steps = Steps(self)
                async for data in response.aiter_bytes():
                    for step in steps.read(data):
                        yield step
                for step in steps.end():
                    yield step

    async def batch(self, images: Sequence[Image], **wishes: Unpack[Wishes]) -> list[Classification | Refused]:
        return items(await self._ask(self._several(images, wishes), BatchAnswer)) if len(images) else []

    async def budget(self) -> BudgetState:
        return await self._ask({"method": "GET", "url": "/budget"}, BudgetState)

    async def set_budget(
        self,
        kind: BudgetKind | None = None,
        value: SupportsFloat | None = None,
        latency_ms: SupportsFloat | None = None,
    ) -> BudgetState:
        return await self._ask(self._budget(kind, value, latency_ms), BudgetState)

    async def model(self) -> ModelDescription:
        return await self._ask({"method": "GET", "url": "/model"}, ModelDescription)

    async def wait_ready(self, timeout_s: float = DEFAULT_READY_S) -> None:
        patience = Patience(inf, timeout_s)

        async def ask() -> None:
            self._read(await self._send(self._ready(patience.left_s)), Readiness)

        await self._patiently(ask, patience)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, call: dict[str, Any], shape: type[M]) -> M:
        async def ask() -> M:
            return self._read(await self._send(call), shape)

        return await self._patiently(ask, self._patience())

    async def _patiently(self, ask: Callable[[], Awaitable[T]], patience: Patience) -> T:
        while True:
            try:
                return await ask()
            except ServerError as error:
                await asyncio.sleep(patience.wait_s(error))

    async def _open(self, call: dict[str, Any]) -> httpx.Response:
        response = await self._send(call, stream=True)
        if response.status_code == 200:
            return response
        with self._explained():
            async with aclosing(response):
                await response.aread()
        raise self._refusal(response)

    async def _send(self, call: dict[str, Any], stream: bool = False) -> httpx.Response:
        with self._explained():
            async with self._places:
                try:
                    return await self._http.send(self._http.build_request(**call), stream=stream)
                except CUT_OFF:
                    return await self._http.send(self._http.build_request(**call), stream=stream)
