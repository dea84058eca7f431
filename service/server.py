"""One process that listens, serves, and stops without losing a request."""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import select
import signal
import socket
from collections.abc import Iterator
from time import monotonic

import uvicorn

from service.api.gate import Gate
from service.api.lifecycle import Lifecycle
from service.api.protocol import DirectProtocol
from service.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 2048
STOPS = [signal.SIGTERM, signal.SIGINT]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a terminal closes; who was started by nohup goes on
    STOPS.append(signal.SIGHUP)
REMEDIES = {  # of an address that cannot be listened on, where another port is none
    errno.EADDRNOTAVAIL: "Name an address of this machine by --host (0.0.0.0: all of them).",
    errno.EACCES: "Ports below 1024 are the system's: choose another with --port.",
}
# A client that takes none of its answer for so long, or whose machine has gone, loses its connection.
UNTAKEN_S = 60.0
# For what the sockets hold when readiness goes: connections are accepted until none waits, but not for ever. Then some
# turns of the event loop: to open the last of them, to read every connection, to begin what has been read.
LAST_CALL_S = 1.0
LAST_TURNS = 20
# For requests that were on their way when readiness went: they still hear that the server is stopping. It listens
# until none has come for so long, yet not for ever.
QUIET_S = 0.25
MAX_LINGER_S = 2.0
LEAVING_S = 0.5  # for the last answers to leave, once all is answered or told that it will not be
FAILED_S = 1.0  # for requests to hear that the server cannot work any more


class ServerFailed(Exception):  # noqa: N818
    """The server cannot start, or cannot go on; the message says why."""


class ListenError(Exception):
    """The address cannot be listened on; the message says which and what to do."""


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket, first of all, so that a taken port is known before anything slow is done.

    Raises:
        ListenError: the address is taken, forbidden or unknown.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ListenError(f"--host {host!r} is no address of this machine ({error.strerror})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; what is accepted inherits it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNTAKEN_S * 1e3))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        remedy = REMEDIES.get(error.errno or 0, "Choose another with --port (0 takes a free one).")
        raise ListenError(f"cannot listen on {host} port {port}: {error.strerror}. {remedy}") from None
    return listener


def use_one_heap() -> None:
    """Let all threads take their small blocks from one heap; to be called before there are others.

    glibc's malloc gives threads heaps of their own, where what one has freed is lost to the others: under ten thousand
    mixed requests resident memory crept up by 175 KiB a minute, where with one heap it stands still, at the same
    processor time a request. Other C libraries have no such setting.
    """
    m_arena_max = -8  # of malloc.h
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(m_arena_max, 1)


class Server(uvicorn.Server):
    """uvicorn with another end: on SIGTERM, SIGINT or SIGHUP readiness goes, what was accepted is answered, then it
    stops.

    A second signal ends the process at once; not SIGHUP, which both a terminal and its shell may send.
    """

    def __init__(self, app: Gate, lifecycle: Lifecycle, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=DirectProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # ours says more
                server_header=False,
                # A client's own headers must not decide whether it counts as local.
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]  # a fraction will do
                timeout_graceful_shutdown=LEAVING_S,  # type: ignore[arg-type]
            )
        )
        self.lifecycle = lifecycle
        self.drain_s = settings.drain_s
        self.n_unanswered = 0
        self._listeners: list[socket.socket] = []
        self._signalled = False
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._listeners = sockets or []
        await super().serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in STOPS:
            loop.add_signal_handler(number, self._on_signal, number)
        yield

    def _on_signal(self, number: int) -> None:
        if self._signalled and number == signal.SIGHUP:
            return
        if self._signalled:  # draining alone does not count: another process may have asked for it before
            logger.warning("second signal: stopping at once, %d unanswered", self.lifecycle.requests_in_flight)
            logging.shutdown()
            os._exit(128 + number)
        self._signalled = True
        self.begin_drain()

    def begin_drain(self) -> None:
        """Be ready no more, answer what has come, refuse the rest, then stop. Once begun, it goes on."""
        if self._draining is None:
            self.lifecycle.drain()
            self._draining = asyncio.create_task(self._stop())

    def fail(self, why: Exception) -> None:
        """Stop, as no request can be answered any more; those in work hear why. On the event loop."""
        if self._draining is None:
            self.lifecycle.fail(str(why))
            self._draining = asyncio.create_task(self._drain(FAILED_S))

    async def _stop(self) -> None:
        """Take what had come before the signal, though nobody had read it; answer that, refuse the rest."""
        waiting = select.poll()
        for listener in self._listeners:
            waiting.register(listener, select.POLLIN)
        until_s = monotonic() + LAST_CALL_S
        while waiting.poll(0) and monotonic() < until_s:
            await asyncio.sleep(0.001)
        for _ in range(LAST_TURNS):
            await asyncio.sleep(0)
        self.lifecycle.close()
        logger.info("stopping: answering %d requests first", self.lifecycle.requests_in_flight)
        await self._drain(self.drain_s)

    async def _drain(self, limit_s: float) -> None:
        started_s = monotonic()
        deadline_s = started_s + limit_s
        while self.lifecycle.requests_in_flight and monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        self.n_unanswered = self.lifecycle.requests_in_flight
        if self.n_unanswered:
            logger.error("%d requests were not answered within %g s", self.n_unanswered, limit_s)
            self._cut_off()
        linger_until_s = min(deadline_s, monotonic() + MAX_LINGER_S)
        while monotonic() < min(linger_until_s, max(started_s, self.lifecycle.last_refused_s) + QUIET_S):
            await asyncio.sleep(0.01)
        self.should_exit = True

    def _cut_off(self) -> None:
        """Tell those that are in work that they get no answer."""
        self.lifecycle.cut_off()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, DirectProtocol)
            connection.cut_off()
        for task in list(self.server_state.tasks):
            task.cancel()
