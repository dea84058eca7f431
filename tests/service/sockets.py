"""The real application in this process, behind real sockets: a server in a thread, and byte-level connections."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import httpx

from service.api.gate import Gate
from service.engine.engine import Engine
from service.server import Server, listen
from service.settings import Settings
from tests.service.apps import build_app
from tests.waiting import LIMIT_S


class Served(Server):
    """The server, without signal handlers, so that it can run in a thread."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class Here:
    app: Gate
    server: Served
    engine: Engine
    loop: asyncio.AbstractEventLoop
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> "Line":
        return Line(socket.create_connection(("127.0.0.1", self.port), LIMIT_S))

    def metric(self, line: str) -> float:
        [value] = [
            text.split()[-1] for text in httpx.get(self.url + "/metrics").text.splitlines() if text.startswith(line)
        ]
        return float(value)


class Line:
    """One connection, read and written at byte level."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket, self._file = sock, sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> tuple[int, dict[str, str], dict[str, Any]]:
        status = int(self._file.readline().split()[1])
        headers: dict[str, str] = {}
        while (line := self._file.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            assert name not in headers
            headers[name] = value
        return status, headers, json.loads(self._file.read(int(headers["content-length"])))

    def ended(self) -> bool:
        return self._file.read() == b""

    def close(self) -> None:
        self._file.close()
        self.socket.close()


def head(length: int, query: str = "", **more: str) -> bytes:
    fields = {"Host": "localhost", "Content-Type": "image/png", "Content-Length": str(length)}
    fields |= {name.replace("_", "-"): value for name, value in more.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST /classify{query} HTTP/1.1\r\n{lines}\r\n".encode()


def request(body: bytes, query: str = "", **more: str) -> bytes:
    return head(len(body), query, **more) + body


@contextlib.contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Here]:
    engines: list[Engine] = []
    loops: Queue[asyncio.AbstractEventLoop] = Queue()
    app = build_app(folder, engines.append, lambda error: loops.put(asyncio.get_running_loop()), **settings)
    server = Served(app, Settings(bundle=folder))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            loop = loops.get(timeout=LIMIT_S)
            yield Here(app, server, engines[0], loop, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(LIMIT_S)
