"""`python -m service.health`, the containers' health check."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from service.health import DEFAULT_PORT, why_not_ready
from service.server import listen
from service.settings import Settings
from tests.service.process import REPOSITORY, environment, running_server

BUNDLE = REPOSITORY / "models/zoo/cifar100-msdnet"


def health(**variables: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "service.health"],
        cwd=REPOSITORY,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


@contextmanager
def answering(status: int, body: bytes, host: str = "127.0.0.1") -> Iterator[int]:
    """A server that answers every request alike; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer((host, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_ready_server_is_healthy_and_a_stopped_one_is_not(tmp_path: Path) -> None:
    with running_server(BUNDLE, tmp_path / "log", "--lanes", "1", "--device", "cpu") as server:
        assert health(EXITSERVE_PORT=str(server.port)) == (0, "")
        assert server.stop() == 0
    code, told = health(EXITSERVE_PORT=str(server.port))
    assert code == 1
    assert f"port {server.port} on 127.0.0.1 does not answer" in told


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.1 is the only address of its kind")
def test_it_connects_to_the_address_that_the_server_listens_on() -> None:
    with answering(200, b"", "127.0.0.2") as port:
        assert health(EXITSERVE_PORT=str(port), EXITSERVE_HOST="127.0.0.2") == (0, "")
        assert health(EXITSERVE_PORT=str(port), EXITSERVE_HOST="127.0.0.1")[0] == 1
    with answering(200, b"") as port:
        assert health(EXITSERVE_PORT=str(port), EXITSERVE_HOST="0.0.0.0") == (0, "")


def test_it_repeats_the_servers_reason() -> None:
    with answering(503, b'{"detail": "The server is warming up: try again in a moment."}') as port:
        assert why_not_ready(port) == "The server is warming up: try again in a moment."


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"word"', b'{"status": 1}', b"\xff"])
def test_an_answer_of_another_server_is_unhealthy(body: bytes) -> None:
    with answering(404, body) as port:
        assert "is not ExitServe" in (why_not_ready(port) or "")


def test_it_gives_up_on_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.health.TIMEOUT_S", 0.2)
    with listen("127.0.0.1", 0) as listener:
        assert "does not answer" in (why_not_ready(listener.getsockname()[1]) or "")


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "²"])
def test_an_invalid_port_is_named(port: str) -> None:
    code, told = health(EXITSERVE_PORT=port)
    assert code == 1
    assert f"EXITSERVE_PORT is {port!r}" in told


def test_its_default_port_is_the_servers() -> None:
    assert Settings.model_fields["port"].default == DEFAULT_PORT


def test_it_imports_only_the_standard_library() -> None:
    loaded = "import service.health, sys; print(*(n for n in ('numpy', 'pydantic', 'onnxruntime') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
