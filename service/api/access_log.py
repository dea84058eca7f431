"""The access log: one line per request. Nothing here is called when it is off."""

import logging
from collections.abc import Mapping
from time import perf_counter

from service.api.lifecycle import ALWAYS_OPEN
from service.logs import FIELDS

logger = logging.getLogger("service.access")

# Paths are cut here: workers share one pipe, where a write of more than 4,096 bytes may be interleaved with others.
SHOWN_CHARACTERS = 200


def log_request(
    request_id: str,
    traceparent: str | None,
    client: str | None,
    method: str | None,
    path: str,
    status: int,
    n_bytes: int,
    started_s: float,
    notes: Mapping[str, object],
) -> None:
    """Log a request that began at `started_s` (`perf_counter`); `notes` are further fields, such as its outcome.

    For input that was not HTTP, `method` is None and `path` may be empty.
    """
    # Successful probes come every few seconds and would drown out the rest; failed ones are logged.
    level = logging.DEBUG if path in ALWAYS_OPEN and status == 200 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    if len(path) > SHOWN_CHARACTERS:
        path = path[:SHOWN_CHARACTERS] + "..."
    fields = {
        "request_id": request_id,
        "traceparent": traceparent,
        "client": client,
        "method": method,
        "path": path,
        "status": status,
        "response_bytes": n_bytes,
        "duration_ms": round((perf_counter() - started_s) * 1e3, 3),
        **notes,
    }
    logger.log(level, "%s %s %d", method or "-", path or "-", status, extra={FIELDS: fields})
