"""A client of an ExitServe server, for Python: the same calls waiting (`Client`) and awaited (`AsyncClient`).

    with Client("http://127.0.0.1:8000") as client:
        answer = client.classify(Path("cat.png"), deadline_ms=50)
        print(answer.label, answer.confidence, answer.exit, answer.reason)

Answers are the documented shapes of `service.api.answers`; every refusal is an exception whose class says what kind it
is and whose text says what to do. It needs httpx, which the extra `client` brings.
"""

import json
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack

from pydantic import BaseModel, ValidationError

from service.api.answers import BatchAnswer, BudgetState, Classification, LastStep, ModelDescription, Step

try:
    import httpx
except ImportError as error:  # the server does without it
    raise ImportError("service.client needs httpx: pip install httpx") from error

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 30.0
BudgetKind = Literal["average_mflops", "fraction", "accuracy"]
# The connection has ended before an answer came, most likely because the server closed it for being idle as the request
# was on its way. It is sent once more: to classify twice, or to set a budget twice, does no harm.
CUT_OFF = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
Image = bytes | os.PathLike[str]
"""The bytes of an image file, or its path."""
M = TypeVar("M", bound=BaseModel)


class Wishes(TypedDict, total=False):
    """What one classification may ask for; docs/http.md says how they combine."""

    top_k: int
    exit: int
    min_confidence: float
    max_mflops: float
    deadline_ms: float


class ServerError(Exception):
    """No answer. The classes below say which kind; the text says what to do."""


class Unreachable(ServerError):  # noqa: N818 (these are names of states)
    """No server answers there, or it hung up."""


class Refused(ServerError):  # noqa: N818
    """The server answered with a problem (RFC 9457).

    Attributes:
        status: HTTP status.
        kind: stable name of the problem, for programs.
        document: all of it.
    """

    def __init__(
        self, status: int, kind: str, detail: str, document: dict[str, Any], retry_after_s: float | None
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.document, self.retry_after_s = status, kind, document, retry_after_s


class BadRequest(Refused):
    """The request cannot be answered as it is: a parameter, a budget, a body."""


class BadImage(BadRequest):
    """What was sent is no image that can be classified."""


class NotAllowed(Refused):
    """The call needs the admin token, or a client on the server's machine."""


class Later(Refused):
    """Nothing is wrong with the request, but not now; `retry_after_s` says when to come back."""


class Overloaded(Later):
    """The server has more to do than it takes."""


class NotReady(Later):
    """The server is warming up, stopping or broken."""


class DeadlinePassed(Refused):
    """`deadline_ms` passed before a first exit had spoken."""


class ServerFault(Refused):
    """The server failed; its log says more, under the problem's `request_id`."""


IMAGE_KINDS = frozenset({"empty-image", "not-an-image", "broken-image", "image-too-large", "animated-image"})
BY_STATUS: dict[int, type[Refused]] = {
    401: NotAllowed,
    403: NotAllowed,
    429: Overloaded,
    503: NotReady,
    504: DeadlinePassed,
}


def refusal(document: dict[str, Any], retry_after_s: float | None = None) -> Refused:
    """The exception for a problem document, as responses, streams and batches hold them."""
    status, kind = int(document["status"]), str(document["type"]).rpartition(":")[2]
    fallback = ServerFault if status >= 500 else BadImage if kind in IMAGE_KINDS else BadRequest
    return BY_STATUS.get(status, fallback)(status, kind, str(document["detail"]), document, retry_after_s)


class _Calls:
    """What both clients send, and how both read what comes back."""

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._options: dict[str, Any] = {"base_url": url, "timeout": timeout_s, "headers": headers}

    def _one(self, path: str, image: Image, wishes: Wishes) -> dict[str, Any]:
        # What the bytes are, the server sees for itself.
        headers = {"Content-Type": "application/octet-stream"}
        return {"method": "POST", "url": path, "content": _bytes(image), "params": {**wishes}, "headers": headers}

    def _several(self, images: Sequence[Image], wishes: Wishes) -> dict[str, Any]:
        files = [("image", (_name(image, i), _bytes(image))) for i, image in enumerate(images)]
        return {"method": "POST", "url": "/classify/batch", "files": files, "params": {**wishes}}

    def _budget(self, kind: BudgetKind, value: float, latency_ms: float | None) -> dict[str, Any]:
        target = {} if latency_ms is None else {"latency_ms": latency_ms}
        return {"method": "PUT", "url": "/budget", "json": {kind: value, **target}}

    def _read(self, response: "httpx.Response", shape: type[M]) -> M:
        """Return a whole response's document, or raise its problem."""
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            return shape.model_validate_json(response.content)
        except ValidationError as error:
            raise self._stranger(f"its answer is no {shape.__name__} ({error.error_count()} differences)") from None

    def _line(self, line: str) -> Step | LastStep:
        document = json.loads(line)
        if "detail" in document:
            raise refusal(document)
        return (LastStep if document["final"] else Step).model_validate(document)

    def _refusal(self, response: "httpx.Response") -> ServerError:
        try:
            document = response.json()
            retry_after = document.get("retry_after_s", response.headers.get("retry-after"))
            return refusal(document, None if retry_after is None else float(retry_after))
        except (ValueError, KeyError, TypeError, AttributeError):
            return self._stranger(f"it answers {response.status_code} without a problem document")

    def _stranger(self, why: str) -> ServerError:
        return ServerError(
            f"{self.url} does not speak as an ExitServe server of this version does: {why}. Check the URL."
        )

    def _unreachable(self, error: "httpx.TransportError | httpx.InvalidURL") -> Unreachable:
        what = "took too long" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
        return Unreachable(f"{self.url} {what} ({type(error).__name__}: {error}): is a server running there?")


class Client(_Calls):
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
        return _items(self._read(self._send(self._several(images, wishes)), BatchAnswer))

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

    def _send(self, call: dict[str, Any], stream: bool = False) -> "httpx.Response":
        try:
            try:
                return self._http.send(self._http.build_request(**call), stream=stream)
            except CUT_OFF:
                return self._http.send(self._http.build_request(**call), stream=stream)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None


class AsyncClient(_Calls):
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
        return _items(self._read(await self._send(self._several(images, wishes)), BatchAnswer))

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

    async def _send(self, call: dict[str, Any], stream: bool = False) -> "httpx.Response":
        try:
            try:
                return await self._http.send(self._http.build_request(**call), stream=stream)
            except CUT_OFF:
                return await self._http.send(self._http.build_request(**call), stream=stream)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None


def _items(batch: BatchAnswer) -> list[Classification | Refused]:
    answers: list[Classification | Refused] = []
    for item in batch.results:
        if item.answer is not None:
            answers.append(item.answer)
        elif item.problem is not None:
            answers.append(refusal(item.problem.model_dump()))
    return answers


def _bytes(image: Image) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _name(image: Image, number: int) -> str:
    return f"image-{number + 1}" if isinstance(image, bytes) else Path(image).name
