"""One line of the log for every request. Where it is off, none of this is there."""

import logging
from time import perf_counter

from starlette.types import Message, Receive, Scope, Send

from service.api.lifecycle import ALWAYS_OPEN, Gate
from service.logs import FIELDS, NOTES

logger = logging.getLogger("service.access")


class LoggedGate(Gate):
    """The gate, with a line for every request that has come through."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not logger.isEnabledFor(logging.INFO):
            await super().__call__(scope, receive, send)
            return
        started = perf_counter()
        status = n_bytes = 0
        notes: dict[str, object] = {}
        scope[NOTES] = notes

        async def send_seen(message: Message) -> None:
            nonlocal status, n_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                n_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await super().__call__(scope, receive, send_seen)
        finally:
            client = scope.get("client")
            fields = {
                "request_id": scope["request_id"],
                "traceparent": scope.get("traceparent"),
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "response_bytes": n_bytes,
                "duration_ms": round((perf_counter() - started) * 1e3, 3),
                **notes,
            }
            # Probes come every few seconds and would bury the rest; one that finds something wrong is told.
            level = logging.DEBUG if scope["path"] in ALWAYS_OPEN and status == 200 else logging.INFO
            logger.log(level, "%s %s %d", scope["method"], scope["path"], status, extra={FIELDS: fields})
