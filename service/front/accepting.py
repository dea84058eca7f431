"""How a worker takes connections from the socket that all workers share: in turns with the others.

The kernel wakes every worker for a new connection, and whoever comes first takes all that wait: clients that connect
together and stay, as most do, would all be one worker's. So a worker that has more of them than another stands back
for a moment; what nobody has taken by then it takes itself.
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
# Taken in others' place each time that these have not come: enough for a thousand a second where one is stuck, and so
# few that one that waits for a core comes in time for its share.
IN_THEIR_PLACE = 2


class Acceptor:
    """Accepts for one worker, on its event loop; stands where uvicorn has an asyncio server.

    Args:
        listener: listening; the caller closes it.
        make_protocol: called for each connection, with what is to be called when it has ended.
        memory: tells the workers of each other's connections.
        worker: which one this is, from 0.
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
        """As an asyncio server has it."""

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
        """Some may be left: the others are gone, stuck, or busier than they look."""
        self._timer = None
        self._loop.add_reader(self._listener, self._accept)
        for _ in range(IN_THEIR_PLACE):
            if not self._take():
                return

    def _take(self) -> bool:
        """Take one; False where none waits."""
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return False
        except OSError as error:  # out of descriptors, most likely, and still so in a moment
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
            logger.debug("a connection was lost as it was opened", exc_info=True)
            sock.close()
            self._lost()
