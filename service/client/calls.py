"""What both clients share: building requests and reading responses. Only the sending differs."""

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
# The connection ended before the response, most likely because the server closed it as idle while the request was on
# its way. The request is sent once more: classifying twice, or setting a budget twice, does no harm.
CUT_OFF = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
M = TypeVar("M", bound=BaseModel)


class Wishes(TypedDict, total=False):
    """Options of a classification; docs/http.md says how they combine. None means not set."""

    top_k: int | None
    exit: int | None
    min_confidence: float | None
    max_mflops: float | None
    deadline_ms: float | None


class Calls:
    """Base class of both clients; see `Client`."""

    def __init__(self, url: str, token: str | None, timeout_s: float | None, retries: int) -> None:
        if retries < 0:
            raise ValueError(f"retries is {retries} but must be 0 or more")
        self.url = _checked(url)
        self._retries, self._timeout_s = retries, timeout_s
        self._options: dict[str, Any] = {"base_url": url, "timeout": timeout_s, "headers": _authorization(token)}

    def _patience(self) -> Patience:
        return Patience(self._retries, self._timeout_s)

    def _one(self, path: str, image: Image, wishes: Wishes) -> dict[str, Any]:
        # The server detects the format from the bytes.
        headers = {"Content-Type": "application/octet-stream"}
        return {"method": "POST", "url": path, "content": contents(image), "params": _asked(wishes), "headers": headers}

    def _several(self, images: Sequence[Image], wishes: Wishes) -> dict[str, Any]:
        files = [("image", (name(image, i), contents(image))) for i, image in enumerate(images)]
        return {"method": "POST", "url": "/classify/batch", "files": files, "params": _asked(wishes)}

    def _budget(
        self, kind: BudgetKind | None, value: SupportsFloat | None, latency_ms: SupportsFloat | None
    ) -> dict[str, Any]:
        if (kind is None) != (value is None) or (kind is None and latency_ms is None):
            raise ValueError('give a kind of budget and its value, as in ("fraction", 0.4), or latency_ms, or both')
        asked = {kind: value, "latency_ms": latency_ms}
        numbers = {what: _number(what, number) for what, number in asked.items() if what and number is not None}
        return {"method": "PUT", "url": "/budget", "json": numbers}

    def _ready(self, left_s: float) -> dict[str, Any]:
        """A readiness request, with a timeout of `timeout_s` or, if shorter, the time left, at least `FIRST_S`."""
        timeout_s = min(inf if self._timeout_s is None else self._timeout_s, max(left_s, FIRST_S))
        return {"method": "GET", "url": "/readyz", "timeout": timeout_s}

    def _read(self, response: httpx.Response, shape: type[M]) -> M:
        """Return the document of a complete response, or raise its problem."""
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
        """Translate httpx's errors into the client's own."""
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
    """Parses the lines of a stream as they arrive; raises the errors of `calls`.

    Splits at line feeds only: httpx would also split at U+2028 and others, which a label may contain.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._rest = b""  # data after the last line feed
        self._last: Step | LastStep | None = None

    def read(self, data: bytes) -> Iterator[Step | LastStep]:
        """Yield the steps in the lines that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._last = self._calls._line(line)
            yield self._last

    def end(self) -> Iterator[Step | LastStep]:
        """Yield what is left once the connection has ended normally.

        Raises:
            Unreachable: the answer is missing: the last line is not an answer, or is truncated.
        """
        try:
            if self._rest:
                yield from self.read(b"\n")
        except Refused:
            raise
        except ServerError:
            if self._last is None:  # else earlier lines were valid: this one is truncated
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
    """Check a server's URL; returns it without credentials, for use in messages.

    Raises:
        Unreachable: it cannot be the URL of a server.
    """
    try:
        parsed = httpx.URL(url)
        why = "" if parsed.scheme in ("http", "https") and parsed.host else "it needs http:// or https://, and a host"
        parsed.raw_host.decode().encode("idna")  # as connecting does: fails for empty or too long labels
        shown = str(parsed.copy_with(userinfo=b"")) if parsed.userinfo else url
    except (httpx.InvalidURL, UnicodeError) as error:
        why, shown = str(error), url.rpartition("@")[2]
    if why:
        raise Unreachable(f"{shown!r} is no URL of a server ({why}): it looks like {DEFAULT_URL}.")
    return shown


def _authorization(token: str | None) -> dict[str, str]:
    """The header for a token. No message may show any part of the token."""
    token = (token or "").strip()  # a token read from a file ends in a newline
    if not (token.isascii() and token.isprintable()):
        raise ValueError("token has characters that are not printable ASCII: give the server's admin token and no more")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _asked(wishes: Wishes) -> dict[str, Any]:
    return {wish: value for wish, value in wishes.items() if value is not None}


def _number(what: str, value: SupportsFloat) -> float:
    """Convert to a finite float, since `json` cannot serialise NumPy's numbers."""
    number = float(value)
    if not isfinite(number):
        raise ValueError(f"{what} is {number} but must be a finite number")
    return number
