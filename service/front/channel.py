"""A stream of frames between two processes, over a non-blocking socket.

A socket rather than a ring buffer in shared memory: a ring needs memory barriers, which Python lacks, to order writes
before reads and never lose a wake-up. The kernel does both within the one system call that a wake-up takes anyway,
and reports when the other end has died.
"""

import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

HEAD = struct.Struct("<IB3x")  # bytes of the payload, kind
READ_BYTES = 256 * 1024


class Frame(NamedTuple):
    kind: int
    payload: bytes


class Channel:
    """One end of the stream. `send` may be called on any thread, `receive` on one only.

    Args:
        sock: a connected stream socket, owned by this from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._sending = threading.Lock()
        self._unsent = bytearray()
        self._unread = bytearray()
        self.is_closed = False  # by either end; later sends are discarded

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: int, payload: bytes = b"") -> bool:
        """Send a frame; False if part of it is still buffered: call `flush` once the socket is writable."""
        return self.send_all(((kind, payload),))

    def send_all(self, frames: Iterable[tuple[int, bytes]]) -> bool:
        """Send frames with one system call and one wake-up of the other end; returns as `send` does."""
        with self._sending:
            for kind, payload in frames:
                self._unsent += HEAD.pack(len(payload), kind)
                self._unsent += payload
            return self._flush()

    def flush(self) -> bool:
        """Send what is still buffered; returns as `send` does."""
        with self._sending:
            return self._flush()

    def _flush(self) -> bool:
        try:
            while self._unsent and not self.is_closed:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return False
        except OSError:  # the other end has gone: `receive` reports it too
            self.is_closed = True
        self._unsent.clear()
        return True

    def receive(self) -> list[Frame]:
        """Return the complete frames received so far, without blocking. Sets `is_closed` at the end of the stream."""
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.is_closed = True
            return []
        self._unread += data
        return list(self._frames())

    def _frames(self) -> Iterator[Frame]:
        start = 0
        while len(self._unread) >= start + HEAD.size:
            length, kind = HEAD.unpack_from(self._unread, start)
            end = start + HEAD.size + length
            if len(self._unread) < end:
                break
            yield Frame(kind, bytes(self._unread[start + HEAD.size : end]))
            start = end
        del self._unread[:start]

    def close(self) -> None:
        with self._sending:
            self.is_closed = True
            self._socket.close()
