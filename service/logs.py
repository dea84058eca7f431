"""Logging setup: one JSON object per line, or plain text."""

import json
import logging
import sys
import warnings
from datetime import UTC, datetime

import orjson

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
FIELDS = "fields"  # attribute of a record, set by `extra={FIELDS: {...}}`: further members of its JSON object
NOTES = "notes"  # key of a request's ASGI scope: further fields of its log line; absent if it has none


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: time (UTC), level, logger, message, `FIELDS`, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(document, default=str).decode()
        except TypeError:  # orjson refuses strings that are not valid Unicode, such as some file names
            return json.dumps(document, default=str, separators=(",", ":"))


def set_up_logs(level: str, as_json: bool) -> None:
    """Log to standard error at `level` and above."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in ("uvicorn.error", "python_multipart", "PIL"):  # we log this, or tell the client
        logging.getLogger(noisy).setLevel(max(logging.ERROR, logging.root.level))
    # Pillow warns of oddities in images, thousands of times for a crafted one. Python would print the warnings beside
    # the log, and keep every text for ever.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
