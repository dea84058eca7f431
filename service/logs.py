"""Logging setup: one JSON object per line, or plain text; on standard error, whether anybody reads it or not."""

import contextlib
import json
import logging
import os
import select
import stat
import sys
import warnings
from datetime import UTC, datetime
from time import monotonic

import orjson

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
FIELDS = "fields"  # attribute of a record, set by `extra={FIELDS: {...}}`: further members of its JSON object
NOTES = "notes"  # key of a request's ASGI scope: further fields of its log line; absent if it has none

# Time to wait for a reader of standard error that is behind, in all, until it has kept up for `PERIOD_S`.
PATIENCE_S, PERIOD_S = 1.0, 60.0


class Outlet:
    """Writes lines to a file, pipe or terminal, and gives up where its reader has stopped reading.

    Otherwise a log collector that hangs, or Ctrl-S in a terminal, would stop whoever writes: the event loop, and with
    it every request and the drain. For one thread at a time.

    Args:
        descriptor: of the file; left open.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._blocks = _without_blocking(descriptor)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._patience_s, self._waited_s = PATIENCE_S, 0.0  # what is left of it; when it last waited (monotonic)
        self._is_cut = False  # the last line was written in part

    def put(self, line: str) -> bool:
        """Write a line; False if it was not taken in time, at least not to its end.

        Raises:
            OSError: it cannot be written, for example because the reader is gone.
        """
        data = (b"\n" if self._is_cut else b"") + f"{line}\n".encode(errors="backslashreplace")
        n_written = 0
        # Room means room for this many bytes of a pipe: where the descriptor blocks, more would.
        while n_written < len(data) and (n := self._write(data[n_written : n_written + select.PIPE_BUF])):
            n_written += n
        if n_written:
            self._is_cut = n_written < len(data)
        return n_written == len(data)

    def _write(self, data: bytes) -> int:
        """Return how many bytes were taken in time."""
        if not self._blocks:
            with contextlib.suppress(BlockingIOError):
                return os.write(self._descriptor, data)
        with contextlib.suppress(BlockingIOError):  # another process, which shares the pipe, has taken the room
            return os.write(self._descriptor, data) if self._has_room() else 0
        return 0

    def _has_room(self) -> bool:
        """Wait until something can be written, as long as there is patience left."""
        if self._poll.poll(0):
            return True
        began_s = monotonic()
        if began_s > self._waited_s + PERIOD_S:
            self._patience_s = PATIENCE_S
        has_room = bool(self._poll.poll(1e3 * self._patience_s))
        self._waited_s = monotonic()
        self._patience_s = max(0.0, self._patience_s - (self._waited_s - began_s))
        return has_room


def _without_blocking(descriptor: int) -> tuple[int, bool]:
    """Return a descriptor of the same file, and whether writing to it may block.

    A pipe or terminal is opened again: the descriptor itself is shared with other processes, and so are its flags.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode) or os.isatty(descriptor):
        with contextlib.suppress(OSError):  # in a container, its pipes may belong to another user
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), False
    return descriptor, not stat.S_ISREG(mode)


class OutletHandler(logging.Handler):
    """Logs to an outlet. Lines that it does not take are lost; how many, the first line says that it takes again."""

    def __init__(self, outlet: Outlet) -> None:
        super().__init__()
        self._outlet = outlet
        self._n_lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._n_lost and self._outlet.put(self.format(_loss(self._n_lost))):
                self._n_lost = 0
            if self._n_lost or not self._outlet.put(self.format(record)):
                self._n_lost += 1
        except Exception:
            self.handleError(record)


def _loss(n_lines: int) -> logging.LogRecord:
    text = "%d lines of the log are missing here: standard error was not read"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (n_lines,), None)


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
    handler = OutletHandler(Outlet(sys.stderr.fileno()))
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in ("uvicorn.error", "python_multipart", "PIL"):  # we log this, or tell the client
        logging.getLogger(noisy).setLevel(max(logging.ERROR, logging.root.level))
    # Pillow warns of oddities in images, thousands of times for a crafted one. Python would print the warnings beside
    # the log, and keep every text for ever.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
