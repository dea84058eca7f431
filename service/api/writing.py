"""Serialises whole answers, and adapts the application's answers to HTTP/1.0 clients."""

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
    """Return a complete HTTP/1.1 answer, head and body.

    Args:
        fields: its own header fields, in wire format.
        common: the header fields common to all answers, as uvicorn keeps them.
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
    """Header fields in wire format, cached: uvicorn makes a new list every second, for the date."""
    global _latest
    if _latest[0] is not fields:
        _latest = fields, b"".join(b"%b: %b\r\n" % field for field in fields)
    return _latest[1]


async def send_unchunked(cycle: Any, send: Send, message: Message) -> None:
    """Send without chunks, for HTTP/1.0 clients: a body of unknown length ends with the connection.

    uvicorn checks unchunked bodies against an expected length, which is set here to the length of each part. It closes
    such connections anyway.
    """
    if message["type"] == "http.response.body":
        cycle.expected_content_length = len(message.get("body", b""))
    elif not any(name == b"content-length" for name, _ in message.get("headers", ())):
        cycle.chunked_encoding = False
    await send(message)
