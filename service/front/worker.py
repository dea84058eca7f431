"""A worker process: the HTTP application around a proxy of the engine. Started by `supervisor`."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from service.api.app import create_app
from service.api.protocol import DirectProtocol
from service.front.accepting import Acceptor
from service.front.calls import RemoteKeeper, RemoteMetrics
from service.front.channel import Channel
from service.front.memory import SharedMemory
from service.front.outbox import Outbox
from service.front.proxy import RemoteEngine
from service.front.setup import Setup
from service.logs import set_up_logs
from service.server import STOPS, Server, use_one_heap
from service.settled_memory import settle_memory

BEAT_S = 1.0  # how often a worker says that its event loop turns; see `supervisor.STUCK_LOOKS`


class WorkerProtocol(DirectProtocol):
    """A connection that reports when it ends, and writes its answers through the outbox."""

    on_lost: Callable[[], object]
    outbox: Outbox

    def write_answer(
        self, status: int, fields: bytes, body: bytes, request_id: str, traceparent: str | None, keep_alive: bool
    ) -> None:
        self.outbox.put(partial(super().write_answer, status, fields, body, request_id, traceparent, keep_alive))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.on_lost()


class WorkerServer(Server):
    """The server, attached to the engine's process while it runs, with a listening socket shared by all workers."""

    engine: RemoteEngine
    memory: SharedMemory
    number: int

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        for listener in sockets or ():
            acceptor = Acceptor(listener, self._open_connection, self.memory, self.number)
            self.servers.append(acceptor)  # type: ignore[arg-type]

    def _open_connection(self, on_lost: Callable[[], object]) -> WorkerProtocol:
        protocol = WorkerProtocol(self.config, self.server_state, self.lifespan.state)
        protocol.on_lost, protocol.outbox = on_lost, self.engine.outbox
        return protocol

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            self.engine.attach(asyncio.get_running_loop())
            self._beat(1)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # see `supervisor`
            yield

    def _beat(self, n: int) -> None:
        self.memory.set_beats(self.number, n)
        asyncio.get_running_loop().call_later(BEAT_S, self._beat, n + 1)


def main(arguments: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code: 1 if requests went unanswered or the engine's process died.

    Args:
        arguments: the worker's index, and the file descriptors of the listening socket, the channel, the shared memory
            and the setup.
    """
    number, listening, speaking, sharing, telling = map(int, arguments)
    setup = Setup.read(telling)
    os.close(telling)
    settings, bundle = setup.settings, setup.bundle
    set_up_logs(settings.log_level, as_json=settings.access_log == "json")
    use_one_heap()
    memory = SharedMemory(setup.layout, sharing)
    engine = RemoteEngine(
        Channel(socket.socket(fileno=speaking)),
        memory,
        number,
        bundle.manifest.class_names,
        on_drain=lambda: server.begin_drain(),
        on_broken=lambda error: server.fail(error),
    )

    def on_started(error: Exception | None) -> None:
        if error is not None:  # report it, and never count as serving
            server.fail(error)
            return
        settle_memory(settings.max_in_flight)
        engine.say_serving()

    app = create_app(
        bundle,
        engine,
        RemoteMetrics(memory.tally(number), engine.calls),
        setup.targets,
        RemoteKeeper(engine.calls),
        settings,
        setup.admin_token,
        on_started=on_started,
    )
    server = WorkerServer(app, settings)
    server.engine, server.memory, server.number = engine, memory, number
    with socket.socket(fileno=listening) as listener:
        server.run(sockets=[listener])
    return 1 if server.n_unanswered or not engine.is_connected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
