"""Serves HTTP, decoding and the engine in one process; `service.front` uses several."""

import asyncio
import socket
from collections.abc import Callable

from models.bundle import Bundle
from service.api.app import create_app
from service.api.ports import KeeperPort, MetricsPort
from service.budget.target import Targets
from service.engine.engine import Engine
from service.server import Server, ServerFailed
from service.settings import Settings
from service.settled_memory import settle_memory


def serve(
    bundle: Bundle,
    engine: Engine,
    metrics: MetricsPort,
    targets: Targets,
    keeper: KeeperPort,
    settings: Settings,
    admin_token: str | None,
    listener: socket.socket,
    say_ready: Callable[[], object],
) -> int:
    """Serve in the engine's process until stopped by a signal, and return the exit code. See `create_app`.

    Raises:
        ServerFailed: the engine did not start, or broke down.
    """
    failure: list[Exception] = []

    def on_broken(error: Exception) -> None:
        failure.append(error)
        server.fail(error)

    def on_started(error: Exception | None) -> None:
        if error is not None:
            failure.append(error)
            server.should_exit = True
            return
        loop = asyncio.get_running_loop()
        engine.broken.add_done_callback(lambda broken: loop.call_soon_threadsafe(on_broken, broken.result()))
        settle_memory(settings.max_in_flight)
        say_ready()

    app = create_app(bundle, engine, metrics, targets, keeper, settings, admin_token, on_started)
    server = Server(app, settings)
    server.run(sockets=[listener])
    if failure:
        raise ServerFailed(str(failure[0])) from failure[0]
    return 1 if server.n_unanswered else 0
