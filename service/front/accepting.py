"""How a worker accepts connections from the listening socket shared by all workers, balancing them.

The kernel wakes every worker for a new connection, and the first takes all that are pending: clients that connect
together and keep their connections, as most do, would all go to one worker. So a worker that has more connections than
another pauses briefly, and then accepts what no other worker has taken.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

from service.front.memory import SharedMemory

logger = logging.getLogger(__name__)

STAND_BACK_S = 0.002
OUT_OF_ORDER_S = 1.0
MAX_AT_ONCE = 64
# Accepted after each pause that left connections pending: enough for a thousand a second where another worker is stuck,
# and few enough that a worker merely waiting for a core still gets its share.
IN_THEIR_PLACE = 2


class Acceptor:
    """Accepts for one worker, on its event loop; replaces the asyncio server in uvicorn.

    Args:
        listener: the listening socket; the caller closes it.
        make_protocol: makes the protocol of a connection, given a callback to call when the connection ends.
        memory: holds every worker's number of connections.
        worker: this worker's index, from 0.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[Callable[[], object]], asyncio.Protocol],
        memory: SharedMemory,
        worker: int,
    ) -> None:
        self._listener, self._make_protocol = listener, make_protocol
        self._memory, self._worker = memory, worker
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[object]] = set()
        self._n_open = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        listener.setblocking(False)
        self._tell()
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accept no more."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._timer is None:
            self._loop.remove_reader(self._listener)
        else:
            self._timer.cancel()
        self._memory.set_connections(self._worker, None)

    async def wait_closed(self) -> None:
        """Part of the asyncio server's interface; there is nothing to wait for."""

    def _lost(self) -> None:
        self._n_open -= 1
        self._tell()

    def _tell(self) -> None:
        if not self._is_closed:
            self._memory.set_connections(self._worker, self._n_open)

    def _accept(self) -> None:
        for _ in range(MAX_AT_ONCE):
            least = self._memory.least_connections_beside(self._worker)
            if least is not None and self._n_open > least + 1:
                self._rest(STAND_BACK_S)
                return
            if not self._take():
                return

    def _rest(self, seconds: float) -> None:
        if self._timer is None:
            self._loop.remove_reader(self._listener)
            self._timer = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        """Accept a few of the connections that the others left: they may have died, be stuck or be busy."""
        self._timer = None
        self._loop.add_reader(self._listener, self._accept)
        for _ in range(IN_THEIR_PLACE):
            if not self._take():
                return

    def _take(self) -> bool:
        """Accept one connection; False if none could be accepted."""
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return False
        except OSError as error:  # most likely out of file descriptors: retry after a while
            logger.error("connections cannot be accepted: %s", error)
            self._rest(OUT_OF_ORDER_S)
            return False
        self._n_open += 1
        self._tell()
        opening = self._loop.create_task(self._open(sock))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        return True

    async def _open(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._make_protocol(self._lost), sock)
        except Exception:  # the client may have left by now
            logger.debug("a connection was lost while it was being opened", exc_info=True)
            sock.close()
            self._lost()
