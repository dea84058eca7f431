"""One line of the log for every request. Where it is off, none of this is there."""

import logging
from collections.abc import Mapping
from time import perf_counter

from service.api.lifecycle import ALWAYS_OPEN
from service.logs import FIELDS

logger = logging.getLogger("service.access")

# Of a path. Workers write to one pipe, and what is longer than its 4,096 bytes ends up in the midst of others' lines.
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
    """Write a request's line; `started_s` is of `perf_counter`, `notes` says what became of it.

    What was no HTTP has no method, and may have no path.
    """
    # Probes come every few seconds and would bury the rest; one that finds something wrong is told.
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
