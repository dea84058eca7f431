"""The client whose calls wait."""

from collections.abc import Iterator, Sequence
from contextlib import closing
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


class Client(Calls):
    """Calls that wait. Safe to share between threads; close it, or use it as a context manager.

    Args:
        url: of the server.
        token: its admin token, which `set_budget` needs where one is configured.
        timeout_s: how long to wait for the server at each step of a request.
    """

    def __init__(self, url: str = DEFAULT_URL, token: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(url, token, timeout_s)
        self._http = httpx.Client(**self._options)

    def classify(self, image: Image, **wishes: Unpack[Wishes]) -> Classification:
        """Classify one image.

        Raises:
            ServerError: of the class that fits.
            OSError: the file cannot be read.
        """
        return self._read(self._send(self._one("/classify", image, wishes)), Classification)

    def stream(self, image: Image, **wishes: Unpack[Wishes]) -> Iterator[Step | LastStep]:
        """Classify one image and yield what each exit says, when it does; the last item is the answer.

        To leave off early gives the image up at the server. Raises as `classify` does.
        """
        try:
            with closing(self._send(self._one("/classify/stream", image, wishes), stream=True)) as response:
                if response.status_code != 200:
                    response.read()
                    raise self._refusal(response)
                for line in response.iter_lines():
                    yield self._line(line)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None

    def batch(self, images: Sequence[Image], **wishes: Unpack[Wishes]) -> list[Classification | Refused]:
        """Classify several images in one request; an answer or the refusal of each, in order."""
        return items(self._read(self._send(self._several(images, wishes)), BatchAnswer)) if images else []

    def budget(self) -> BudgetState:
        return self._read(self._send({"method": "GET", "url": "/budget"}), BudgetState)

    def set_budget(self, kind: BudgetKind, value: float, latency_ms: float | None = None) -> BudgetState:
        """Set the average compute per image, e.g. `set_budget("fraction", 0.4)`; returns the new state.

        With `latency_ms` the server works below it under load, as far as it takes to answer 95 % in that time.
        """
        return self._read(self._send(self._budget(kind, value, latency_ms)), BudgetState)

    def model(self) -> ModelDescription:
        return self._read(self._send({"method": "GET", "url": "/model"}), ModelDescription)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _send(self, call: dict[str, Any], stream: bool = False) -> httpx.Response:
        try:
            try:
                return self._http.send(self._http.build_request(**call), stream=stream)
            except CUT_OFF:
                return self._http.send(self._http.build_request(**call), stream=stream)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None
