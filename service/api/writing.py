"""Answers as bytes: those that leave whole, and those of the application to clients that know no chunks."""

from typing import Any

from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

Fields = list[tuple[bytes, bytes]]


def whole_answer(
    status: int,
    fields: bytes,
    common: Fields,
    body: bytes,
    request_id: str,
    traceparent: str | None,
    keep_alive: bool,
) -> bytes:
    """A whole answer.

    Args:
        fields: of its head, as they are sent.
        common: those that every answer has, as uvicorn has them.
    """
    parts = [
        STATUS_LINE[status],
        fields,
        b"content-length: %d\r\nx-request-id: %b\r\n" % (len(body), request_id.encode()),
        _as_bytes(common),
    ]
    if traceparent is not None:
        parts += (b"traceparent: ", traceparent.encode(), b"\r\n")
    if not keep_alive:
        parts.append(b"connection: close\r\n")
    parts += (b"\r\n", body)
    return b"".join(parts)


_latest: tuple[Fields, bytes] = ([], b"")


def _as_bytes(fields: Fields) -> bytes:
    """Header fields as they are sent; those that every answer has uvicorn makes anew every second, for the date."""
    global _latest
    if _latest[0] is not fields:
        _latest = fields, b"".join(b"%b: %b\r\n" % field for field in fields)
    return _latest[1]


async def send_unchunked(cycle: Any, send: Send, message: Message) -> None:
    """Send to a client of HTTP/1.0, which knows no chunks: what has no length ends with its connection.

    uvicorn counts the bytes that are not in chunks: these are as many as come. It closes such connections anyway.
    """
    if message["type"] == "http.response.body":
        cycle.expected_content_length = len(message.get("body", b""))
    elif not any(name == b"content-length" for name, _ in message.get("headers", ())):
        cycle.chunked_encoding = False
    await send(message)
