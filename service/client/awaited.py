"""The client whose calls are awaited."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from service.api.answers import BatchAnswer, BudgetState, Classification, LastStep, ModelDescription, Step
from service.client.calls import (
    CUT_OFF,
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    BudgetKind,
    Calls,
    Image,
    Wishes,
    items,
)
from service.client.errors import Refused


class AsyncClient(Calls):
    """The same calls, awaited; see `Client`."""

    def __init__(self, url: str = DEFAULT_URL, token: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(url, token, timeout_s)
        self._http = httpx.AsyncClient(**self._options)

    async def classify(self, image: Image, **wishes: Unpack[Wishes]) -> Classification:
        return self._read(await self._send(self._one("/classify", image, wishes)), Classification)

    async def stream(self, image: Image, **wishes: Unpack[Wishes]) -> AsyncIterator[Step | LastStep]:
        try:
            sent = await self._send(self._one("/classify/stream", image, wishes), stream=True)
            async with aclosing(sent) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refusal(response)
                async for line in response.aiter_lines():
                    yield self._line(line)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None

    async def batch(self, images: Sequence[Image], **wishes: Unpack[Wishes]) -> list[Classification | Refused]:
        return items(self._read(await self._send(self._several(images, wishes)), BatchAnswer)) if images else []

    async def budget(self) -> BudgetState:
        return self._read(await self._send({"method": "GET", "url": "/budget"}), BudgetState)

    async def set_budget(self, kind: BudgetKind, value: float, latency_ms: float | None = None) -> BudgetState:
        return self._read(await self._send(self._budget(kind, value, latency_ms)), BudgetState)

    async def model(self) -> ModelDescription:
        return self._read(await self._send({"method": "GET", "url": "/model"}), ModelDescription)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: dict[str, Any], stream: bool = False) -> httpx.Response:
        try:
            try:
                return await self._http.send(self._http.build_request(**call), stream=stream)
            except CUT_OFF:
                return await self._http.send(self._http.build_request(**call), stream=stream)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None
