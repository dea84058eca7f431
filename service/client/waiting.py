"""The client whose calls wait."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from math import inf
from time import sleep
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


class Client(Calls):
    """Calls that wait. Safe to share between threads; close it, or use it as a context manager.

    Args:
        url: of the server.
        token: its admin token, which `set_budget` needs where one is configured.
        timeout_s: how long to wait for the server at each step of a request; None: for ever.
        retries: how often to make a call again that ends in `Later` or `Unreachable`, after the time that the server
            names, or ever longer ones. None begins later than `timeout_s` after the first.

    Raises:
        Unreachable: it is no URL.
        ValueError: the token is not printable ASCII; retries below 0.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        retries: int = 0,
    ) -> None:
        super().__init__(url, token, timeout_s, retries)
        self._http = httpx.Client(**self._options)

    def classify(self, image: Image, **wishes: Unpack[Wishes]) -> Classification:
        """Classify one image.

        Args:
            image: the bytes of an image file, its path, the file itself, opened as binary, an image of Pillow's or a
                NumPy array of uint8 [height, width, 3]. The last two are sent as PNG.

        Raises:
            ServerError: of the class that fits.
            OSError: the file cannot be read.
            TypeError, ValueError: it is no image.
        """
        return self._ask(self._one("/classify", image, wishes), Classification)

    def stream(self, image: Image, **wishes: Unpack[Wishes]) -> Iterator[Step | LastStep]:
        """Classify one image and yield what each exit says, when it does; the last item is the answer.

        To leave off early gives the image up at the server. Raises as `classify` does. What has begun is not retried.
        """
        call = self._one("/classify/stream", image, wishes)
        with self._explained(), closing(self._patiently(lambda: self._open(call), self._patience())) as response:
            steps = Steps(self)
            for data in response.iter_bytes():
                yield from steps.read(data)
            yield from steps.end()

    def batch(self, images: Sequence[Image], **wishes: Unpack[Wishes]) -> list[Classification | Refused]:
        """Classify several images in one request; an answer or the refusal of each, in order."""
        return items(self._ask(self._several(images, wishes), BatchAnswer)) if len(images) else []

    def budget(self) -> BudgetState:
        return self._ask({"method": "GET", "url": "/budget"}, BudgetState)

    def set_budget(
        self, kind: BudgetKind, value: SupportsFloat, latency_ms: SupportsFloat | None = None
    ) -> BudgetState:
        """Set the average compute per image, e.g. `set_budget("fraction", 0.4)`; returns the new state.

        With `latency_ms` the server works below it under load, as far as it takes to answer 95 % in that time.

        Raises:
            ServerError: of the class that fits.
            ValueError: a number is not finite.
        """
        return self._ask(self._budget(kind, value, latency_ms), BudgetState)

    def model(self) -> ModelDescription:
        return self._ask({"method": "GET", "url": "/model"}, ModelDescription)

    def wait_ready(self, timeout_s: float = DEFAULT_READY_S) -> None:
        """Wait until the server is ready to classify, so many seconds at most.

        Raises:
            NotReady, Unreachable: it was not, or nobody answered, the last time it was asked.
            ServerError: something else answers there.
        """
        patience = Patience(inf, timeout_s)
        self._patiently(lambda: self._read(self._send(self._ready(patience.left_s)), Readiness), patience)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, call: dict[str, Any], shape: type[M]) -> M:
        return self._patiently(lambda: self._read(self._send(call), shape), self._patience())

    def _patiently(self, ask: Callable[[], T], patience: Patience) -> T:
        while True:
            try:
                return ask()
            except ServerError as error:
                sleep(patience.wait_s(error))

    def _open(self, call: dict[str, Any]) -> httpx.Response:
        response = self._send(call, stream=True)
        if response.status_code == 200:
            return response
        with self._explained(), closing(response):
            response.read()
        raise self._refusal(response)

    def _send(self, call: dict[str, Any], stream: bool = False) -> httpx.Response:
        with self._explained():
            try:
                return self._http.send(self._http.build_request(**call), stream=stream)
            except CUT_OFF:
                return self._http.send(self._http.build_request(**call), stream=stream)
