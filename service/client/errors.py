"""The client's exceptions: a class for each kind of refusal, as listed in docs/http.md."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any


class ServerError(Exception):
    """There is no answer. The subclass says why; the text says what to do."""


class Unreachable(ServerError):  # noqa: N818 (these are names of states)
    """No server can be reached at the URL, or it closed the connection or took too long."""


class Refused(ServerError):  # noqa: N818
    """The server answered with a problem (RFC 9457), or a gateway in front of it had no server to ask.

    Attributes:
        status: HTTP status.
        kind: stable name of the problem, for programs; "gateway" for a gateway's answer without a problem document.
        document: the problem document; empty if there was none.
        retry_after_s: seconds after which to retry; None if the answer does not say.
    """

    def __init__(
        self, status: int, kind: str, detail: str, document: dict[str, Any], retry_after_s: float | None
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.document, self.retry_after_s = status, kind, document, retry_after_s


class BadRequest(Refused):
    """The request is invalid: a parameter, a budget or a body."""


class BadImage(BadRequest):
    """The body is not an image that can be classified."""


class NotAllowed(Refused):
    """The call needs the admin token, or a client on the server's machine."""


class Later(Refused):
    """The request is valid but cannot be answered now; `retry_after_s` says when to retry."""


class Overloaded(Later):
    """The server has no room for more requests."""


class NotReady(Later):
    """The server is warming up, stopping or broken, or a gateway in front of it cannot reach it."""


class DeadlinePassed(Refused):
    """`deadline_ms` passed before the first exit had a result."""


class ServerFault(Refused):
    """The server failed; its log has details under the problem's `request_id`."""


IMAGE_KINDS = frozenset({"empty-image", "not-an-image", "broken-image", "image-too-large", "animated-image"})
BY_STATUS: dict[int, type[Refused]] = {
    401: NotAllowed,
    403: NotAllowed,
    429: Overloaded,
    503: NotReady,
    504: DeadlinePassed,
}
# Without a problem document, these come from a gateway that has no server to ask or got no response from it.
BY_GATEWAY: dict[int, type[Later]] = {429: Overloaded, 502: NotReady, 503: NotReady, 504: NotReady}


def refusal(document: dict[str, Any], retry_after_s: float | None = None) -> Refused:
    """Return the exception for a problem document from a response, a stream or a batch.

    Args:
        document: the problem document; its own `retry_after_s` has precedence.
        retry_after_s: from the response's header, in seconds, if it has one.

    Raises:
        ValueError, KeyError, TypeError: it is not a problem document.
    """
    status, kind = int(document["status"]), str(document["type"]).rpartition(":")[2]
    fallback = ServerFault if status >= 500 else BadImage if kind in IMAGE_KINDS else BadRequest
    retry_after_s = document.get("retry_after_s", retry_after_s)
    return BY_STATUS.get(status, fallback)(status, kind, str(document["detail"]), document, retry_after_s)


def seconds(retry_after: str | None) -> float | None:
    """A `Retry-After` header, in seconds or a date, as seconds from now; None if absent or unreadable."""
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
