"""Logs as JSON, one object a line, or as text for people."""

import json
import logging
import sys
import warnings
from datetime import UTC, datetime

import orjson

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
FIELDS = "fields"  # of a record, made by `extra={FIELDS: {...}}`: further members of its object
NOTES = "notes"  # of a request's scope: what its line is to say besides; absent where there is no line


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time (UTC), level, logger, message, what was added, the trace of an exception."""

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
        except TypeError:  # a name of a file that is no UTF-8, say: the line is not to be lost for it
            return json.dumps(document, default=str, separators=(",", ":"))


def set_up_logs(level: str, as_json: bool) -> None:
    """Log to standard error from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in ("uvicorn.error", "python_multipart", "PIL"):  # what they tell, the log or the client hears otherwise
        logging.getLogger(noisy).setLevel(max(logging.ERROR, logging.root.level))
    # Pillow warns of what is odd about a picture, thousands of times if the picture's maker likes. Python would print
    # that beside the log, and remember every text for ever.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
