"""What clients send, and how they read what comes back: all of the two but the sending itself."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.api.answers import BatchAnswer, Classification, LastStep, Step
from service.client.errors import Refused, ServerError, Unreachable, refusal

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 30.0
BudgetKind = Literal["average_mflops", "fraction", "accuracy"]
Image = bytes | bytearray | memoryview | str | os.PathLike[str]
"""The bytes of an image file, or its path."""
# The connection has ended before an answer came, most likely because the server closed it for being idle as the request
# was on its way. It is sent once more: to classify twice, or to set a budget twice, does no harm.
CUT_OFF = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
M = TypeVar("M", bound=BaseModel)


class Wishes(TypedDict, total=False):
    """What one classification may ask for; docs/http.md says how they combine."""

    top_k: int
    exit: int
    min_confidence: float
    max_mflops: float
    deadline_ms: float


class Calls:
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

    def _read(self, response: httpx.Response, shape: type[M]) -> M:
        """Return a whole response's document, or raise its problem."""
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            return shape.model_validate_json(response.content)
        except ValidationError as error:
            raise self._stranger(f"its answer is no {shape.__name__} ({error.error_count()} differences)") from None

    def _line(self, line: str) -> Step | LastStep:
        try:
            document = json.loads(line)
            if "detail" in document:
                raise refusal(document)
            return (LastStep if document["final"] else Step).model_validate(document)
        except (ValueError, KeyError, TypeError):
            raise self._stranger("a line of its stream is no step") from None

    def _refusal(self, response: httpx.Response) -> ServerError:
        try:
            retry_after = response.headers.get("retry-after")
            return refusal(response.json(), None if retry_after is None else float(retry_after))
        except (ValueError, KeyError, TypeError):
            return self._stranger(f"it answers {response.status_code} without a problem document")

    def _stranger(self, why: str) -> ServerError:
        return ServerError(
            f"{self.url} does not speak as an ExitServe server of this version does: {why}. Check the URL."
        )

    def _unreachable(self, error: httpx.TransportError | httpx.InvalidURL) -> Unreachable:
        if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
            return Unreachable(f"{self.url!r} is no URL of a server ({error}): it looks like {DEFAULT_URL}")
        what = "took too long" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
        return Unreachable(f"{self.url} {what} ({type(error).__name__}: {error}): is a server running there?")


def items(batch: BatchAnswer) -> list[Classification | Refused]:
    answers: list[Classification | Refused] = []
    for item in batch.results:
        if item.answer is not None:
            answers.append(item.answer)
        elif item.problem is not None:
            answers.append(refusal(item.problem.model_dump()))
    return answers


def _bytes(image: Image) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    raise TypeError(
        f"an image is the bytes of its file, or its path, and not of type {type(image).__name__}: "
        "encode it as PNG or JPEG"
    )


def _name(image: Image, number: int) -> str:
    return Path(image).name if isinstance(image, str | os.PathLike) else f"image-{number + 1}"
