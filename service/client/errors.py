"""What a client raises where there is no answer: a class for each kind of refusal, as docs/http.md lists them."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any


class ServerError(Exception):
    """No answer. The classes below say which kind; the text says what to do."""


class Unreachable(ServerError):  # noqa: N818 (these are names of states)
    """No server answers there, or it hung up."""


class Refused(ServerError):  # noqa: N818
    """The server answered with a problem (RFC 9457), or a gateway before it that has none to ask.

    Attributes:
        status: HTTP status.
        kind: stable name of the problem, for programs; "gateway" where that came without a problem document.
        document: all of it.
        retry_after_s: seconds after which to ask again, where the answer says so.
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
    """The server is warming up, stopping or broken, or a gateway before it cannot reach it."""


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
# Without a problem document they are not the server's own: a gateway that has no server to ask, or heard nothing of it.
BY_GATEWAY: dict[int, type[Later]] = {429: Overloaded, 502: NotReady, 503: NotReady, 504: NotReady}


def refusal(document: dict[str, Any], retry_after_s: float | None = None) -> Refused:
    """The exception for a problem document, as responses, streams and batches hold them.

    Args:
        document: the problem.
        retry_after_s: as the response's head says it, where it has one; what the document says goes before it.

    Raises:
        ValueError, KeyError, TypeError: it is no problem document.
    """
    status, kind = int(document["status"]), str(document["type"]).rpartition(":")[2]
    fallback = ServerFault if status >= 500 else BadImage if kind in IMAGE_KINDS else BadRequest
    retry_after_s = document.get("retry_after_s", retry_after_s)
    return BY_STATUS.get(status, fallback)(status, kind, str(document["detail"]), document, retry_after_s)


def seconds(retry_after: str | None) -> float | None:
    """What a header `Retry-After` says, seconds or a date, as seconds from now; None where it says nothing."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
