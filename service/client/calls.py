"""What clients send, and how they read what comes back: all of the two but the sending itself."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any, Literal, SupportsFloat, TypedDict, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.api.answers import BatchAnswer, Classification, LastStep, Step
from service.client.errors import BY_GATEWAY, Refused, ServerError, Unreachable, refusal, seconds
from service.client.patience import FIRST_S, Patience
from service.client.pictures import Image, contents, name

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 30.0
DEFAULT_READY_S = 60.0
BudgetKind = Literal["average_mflops", "fraction", "accuracy"]
# The connection has ended before an answer came, most likely because the server closed it for being idle as the request
# was on its way. It is sent once more: to classify twice, or to set a budget twice, does no harm.
CUT_OFF = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
M = TypeVar("M", bound=BaseModel)


class Wishes(TypedDict, total=False):
    """What one classification may ask for; docs/http.md says how they combine. None is not to ask."""

    top_k: int | None
    exit: int | None
    min_confidence: float | None
    max_mflops: float | None
    deadline_ms: float | None


class Calls:
    """What both clients send, and how both read what comes back. See `Client`."""

    def __init__(self, url: str, token: str | None, timeout_s: float | None, retries: int) -> None:
        if retries < 0:
            raise ValueError(f"retries is {retries} and has to be 0 or more")
        self.url = _checked(url)
        self._retries, self._timeout_s = retries, timeout_s
        self._options: dict[str, Any] = {"base_url": url, "timeout": timeout_s, "headers": _authorization(token)}

    def _patience(self) -> Patience:
        return Patience(self._retries, self._timeout_s)

    def _one(self, path: str, image: Image, wishes: Wishes) -> dict[str, Any]:
        # What the bytes are, the server sees for itself.
        headers = {"Content-Type": "application/octet-stream"}
        return {"method": "POST", "url": path, "content": contents(image), "params": _asked(wishes), "headers": headers}

    def _several(self, images: Sequence[Image], wishes: Wishes) -> dict[str, Any]:
        files = [("image", (name(image, i), contents(image))) for i, image in enumerate(images)]
        return {"method": "POST", "url": "/classify/batch", "files": files, "params": _asked(wishes)}

    def _budget(self, kind: BudgetKind, value: SupportsFloat, latency_ms: SupportsFloat | None) -> dict[str, Any]:
        target = {} if latency_ms is None else {"latency_ms": _number("latency_ms", latency_ms)}
        return {"method": "PUT", "url": "/budget", "json": {kind: _number(kind, value), **target}}

    def _ready(self, left_s: float) -> dict[str, Any]:
        """Whoever waits for a server is not to wait longer for one answer of it."""
        timeout_s = min(inf if self._timeout_s is None else self._timeout_s, max(left_s, FIRST_S))
        return {"method": "GET", "url": "/readyz", "timeout": timeout_s}

    def _read(self, response: httpx.Response, shape: type[M]) -> M:
        """Return a whole response's document, or raise its problem."""
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            return shape.model_validate_json(response.content)
        except ValidationError as error:
            raise self._stranger(f"its answer is no {shape.__name__} ({error.error_count()} differences)") from None

    def _line(self, line: bytes) -> Step | LastStep:
        try:
            document = json.loads(line)
            if "detail" in document:
                raise refusal(document)
            return (LastStep if document["final"] else Step).model_validate(document)
        except (ValueError, KeyError, TypeError):
            raise self._stranger("a line of its stream is no step") from None

    def _refusal(self, response: httpx.Response) -> ServerError:
        status, retry_after_s = response.status_code, seconds(response.headers.get("retry-after"))
        try:
            return refusal(response.json(), retry_after_s)
        except (ValueError, KeyError, TypeError):
            pass
        why = f"answers {status} without a problem document"
        if status not in BY_GATEWAY:
            return self._stranger(f"it {why}")
        detail = f"{self.url} {why}, as a gateway does that has no server to ask at the moment: try again later."
        return BY_GATEWAY[status](status, "gateway", detail, {}, retry_after_s)

    def _stranger(self, why: str) -> ServerError:
        return ServerError(
            f"{self.url} does not speak as an ExitServe server of this version does: {why}. Check the URL."
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise the errors of httpx as the client's own."""
        try:
            yield
        except httpx.DecodingError as error:
            raise self._stranger(f"its answer cannot be unpacked ({error})") from None
        except httpx.PoolTimeout:
            told = f"{self.url} was not asked: other calls and streams that have not ended hold all connections."
            raise Unreachable(told) from None
        except httpx.RequestError as error:
            what = "took too long" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
            told = f"{self.url} {what} ({type(error).__name__}: {error}): is a server running there?"
            raise Unreachable(told) from None


class Steps:
    """What the lines of a stream say, as they arrive; of `calls`, whose errors it raises.

    Lines end at line feeds alone: httpx cuts at U+2028 and others too, which a label may have.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._rest = b""  # what came after the last line feed
        self._last: Step | LastStep | None = None

    def read(self, data: bytes) -> Iterator[Step | LastStep]:
        """What the lines say whose ends these bytes bring."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._last = self._calls._line(line)
            yield self._last

    def end(self) -> Iterator[Step | LastStep]:
        """What is left, where the connection has ended in order.

        Raises:
            Unreachable: the answer is missing: the last line is another, or was cut.
        """
        try:
            if self._rest:
                yield from self.read(b"\n")
        except Refused:
            raise
        except ServerError:
            if self._last is None:  # else what came before is as it should be
                raise
        if not isinstance(self._last, LastStep):
            told = f"{self._calls.url} ended the stream before the answer, as when a server dies: ask again."
            raise Unreachable(told)


def items(batch: BatchAnswer) -> list[Classification | Refused]:
    answers: list[Classification | Refused] = []
    for item in batch.results:
        if item.answer is not None:
            answers.append(item.answer)
        elif item.problem is not None:
            answers.append(refusal(item.problem.model_dump()))
    return answers


def _checked(url: str) -> str:
    """The URL as messages may show it, without a password.

    Raises:
        Unreachable: it is none of a server.
    """
    try:
        parsed = httpx.URL(url)
        why = "" if parsed.scheme in ("http", "https") and parsed.host else "it needs http:// or https://, and a host"
        parsed.raw_host.decode().encode("idna")  # as the connection will: of a label that is empty or too long, no name
        shown = str(parsed.copy_with(userinfo=b"")) if parsed.userinfo else url
    except (httpx.InvalidURL, UnicodeError) as error:
        why, shown = str(error), url.rpartition("@")[2]
    if why:
        raise Unreachable(f"{shown!r} is no URL of a server ({why}): it looks like {DEFAULT_URL}.")
    return shown


def _authorization(token: str | None) -> dict[str, str]:
    """The header for a token, of which no message may show a part."""
    token = (token or "").strip()  # a file that holds one ends in a newline
    if not (token.isascii() and token.isprintable()):
        raise ValueError("token has characters that are not printable ASCII: give the server's admin token and no more")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _asked(wishes: Wishes) -> dict[str, Any]:
    return {wish: value for wish, value in wishes.items() if value is not None}


def _number(what: str, value: SupportsFloat) -> float:
    """Also of NumPy's numbers, which JSON does not know."""
    number = float(value)
    if not isfinite(number):
        raise ValueError(f"{what} is {number} and has to be a finite number")
    return number
