"""The listening socket, and uvicorn's server with a graceful shutdown that answers what was accepted."""

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
from service.api.protocol import DirectProtocol
from service.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 2048
STOPS = [signal.SIGTERM, signal.SIGINT]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # it is ignored under nohup
    STOPS.append(signal.SIGHUP)
REMEDIES = {  # by errno; for others: to choose another port
    errno.EADDRNOTAVAIL: "Give an address of this machine with --host (0.0.0.0: all of them).",
    errno.EACCES: "Ports below 1024 need privileges: choose another with --port.",
}
# A connection is closed when its client has taken none of the data that waits for it for this long.
UNTAKEN_S = 60.0
# When a drain begins, connections are accepted until none waits, for at most `LAST_CALL_S`. Then follow `LAST_TURNS`
# turns of the event loop, to open the last of them, read every connection, and begin the requests read.
LAST_CALL_S = 1.0
LAST_TURNS = 20
# Requests that were on their way when the drain began are still answered, with a refusal: the server keeps listening
# until none has come for `QUIET_S`, for at most `MAX_LINGER_S`.
QUIET_S = 0.25
MAX_LINGER_S = 2.0
LEAVING_S = 0.5  # for sending the last answers and refusals
FAILED_S = 1.0  # for answering requests with an error, after the server has failed


class ServerFailed(Exception):  # noqa: N818
    """The server cannot start or go on; the message says why."""


class ListenError(Exception):
    """Listening on the address failed; the message names the address and the remedy."""


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket. To be done first, so that a port in use is reported before anything slow is done.

    Raises:
        ListenError: the address is in use, not permitted, or unknown.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ListenError(f"--host {host!r} is not an address of this machine ({error.strerror})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNTAKEN_S * 1e3))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        remedy = REMEDIES.get(error.errno or 0, "Choose another with --port (0 takes a free one).")
        raise ListenError(f"cannot listen on {host} port {port}: {error.strerror}. {remedy}") from None
    return listener


def use_one_heap() -> None:
    """Let all threads allocate from one heap. To be called before other threads start.

    glibc's malloc gives threads heaps of their own, and what is freed in one is of no use to the others: under ten
    thousand mixed requests, resident memory grew by 175 KiB a minute. With one heap it is constant, and a request takes
    the same CPU time. Other C libraries have no such setting.
    """
    m_arena_max = -8  # M_ARENA_MAX in malloc.h
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(m_arena_max, 1)


class Server(uvicorn.Server):
    """uvicorn's server with our drain: on SIGTERM, SIGINT or SIGHUP it turns unready, answers what it has accepted, and
    stops.

    A second signal ends the process at once, unless it is SIGHUP, which both a terminal and its shell may send.
    """

    def __init__(self, app: Gate, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=DirectProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # we have our own
                server_header=False,
                # A client's own headers must not decide whether it counts as local.
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]  # floats work, too
                timeout_graceful_shutdown=LEAVING_S,  # type: ignore[arg-type]
            )
        )
        self.lifecycle = app.lifecycle
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
        if self._signalled:  # not `_draining`: another process may have begun the drain
            logger.warning("second signal: stopping at once, %d unanswered", self.lifecycle.requests_in_flight)
            logging.shutdown()
            os._exit(128 + number)
        self._signalled = True
        self.begin_drain()

    def begin_drain(self) -> None:
        """Stop being ready, answer what has arrived, refuse the rest, then stop. Further calls have no effect."""
        if self._draining is None:
            self.lifecycle.drain()
            self._draining = asyncio.create_task(self._stop())

    def fail(self, why: Exception) -> None:
        """Stop because no request can be answered any more; those in flight are told why. On the event loop."""
        if self._draining is None:
            self.lifecycle.fail(str(why))
            self._draining = asyncio.create_task(self._drain(FAILED_S))

    async def _stop(self) -> None:
        """Accept and read what had arrived before the signal, answer it, and refuse the rest."""
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
        """End requests in flight, telling their clients that they get no answer."""
        self.lifecycle.cut_off()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, DirectProtocol)
            connection.cut_off()
        for task in list(self.server_state.tasks):
            task.cancel()
