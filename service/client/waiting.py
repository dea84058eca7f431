"""The blocking client."""

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
    """Blocking client. Safe to share between threads; close it, or use it as a context manager.

    Args:
        url: the server's URL.
        token: the server's admin token, which `set_budget` needs if one is configured.
        timeout_s: timeout in seconds for each step of a request; None for no timeout.
        retries: how often to retry a call that ends in `Later` or `Unreachable`, after the wait that the server names,
            else with exponential backoff. No retry begins later than `timeout_s` after the call.

    Raises:
        Unreachable: `url` cannot be the URL of a server.
        ValueError: the token is not printable ASCII, or `retries` is below 0.
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
            image: the bytes of an image file, its path, the file itself opened in binary mode, a Pillow image or a
                NumPy array, uint8 [height, width, 3]. The last two are sent as PNG.

        Raises:
            ServerError: there is no answer; the subclass says why.
            OSError: the file cannot be read.
            TypeError, ValueError: `image` is not an image.
        """
        return self._ask(self._one("/classify", image, wishes), Classification)

    def stream(self, image: Image, **wishes: Unpack[Wishes]) -> Iterator[Step | LastStep]:
        """Classify one image and yield the result of each exit as it arrives; the last item is the answer.

        Closing the iterator early abandons the image. Raises as `classify` does. A stream once begun is not retried.
        """
        call = self._one("/classify/stream", image, wishes)
        with self._explained(), closing(self._patiently(lambda: self._open(call), self._patience())) as response:
            steps = Steps(self)
            for data in response.iter_bytes():
                yield from steps.read(data)
            yield from steps.end()

    def batch(self, images: Sequence[Image], **wishes: Unpack[Wishes]) -> list[Classification | Refused]:
        """Classify several images in one request; returns the answer or the refusal of each, in order."""
        return items(self._ask(self._several(images, wishes), BatchAnswer)) if len(images) else []

    def budget(self) -> BudgetState:
        return self._ask({"method": "GET", "url": "/budget"}, BudgetState)

    def set_budget(
        self,
        kind: BudgetKind | None = None,
        value: SupportsFloat | None = None,
        latency_ms: SupportsFloat | None = None,
    ) -> BudgetState:
        """Set the average compute per image, e.g. `set_budget("fraction", 0.4)`; returns the new state.

        With `latency_ms`, the server works below the budget under load, as far as needed to answer 95 % in that time.
        `latency_ms` alone means below the full network's compute.

        Raises:
            ServerError: the call failed; the subclass says why.
            ValueError: a number is not finite; a kind without a value or the reverse; nothing to set.
        """
        return self._ask(self._budget(kind, value, latency_ms), BudgetState)

    def model(self) -> ModelDescription:
        return self._ask({"method": "GET", "url": "/model"}, ModelDescription)

    def wait_ready(self, timeout_s: float = DEFAULT_READY_S) -> None:
        """Wait until the server is ready to classify, for at most `timeout_s` seconds.

        Raises:
            NotReady, Unreachable: at the last try, the server was not ready or could not be reached.
            ServerError: the response was not that of an ExitServe server.
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
