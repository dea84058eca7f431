"""The Python client and the `classify` command against a real server process."""

import asyncio
import http.server
import json
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from service import command
from service.api.answers import LastStep, Step
from service.client import (
    AsyncClient,
    BadImage,
    BadRequest,
    Classification,
    Client,
    DeadlinePassed,
    NotAllowed,
    NotReady,
    Overloaded,
    Refused,
    ServerError,
    ServerFault,
    Unreachable,
    refusal,
)
from tests.bundles import CLASS_NAMES, random_images
from tests.service.apps import png
from tests.service.process import REPOSITORY, environment, running_server

BODIES = [png(image) for image in random_images(3, seed=29)]
TOKEN = "a-token-for-tests"


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "log"
    with running_server(folder, log, EXITSERVE_ADMIN_TOKEN=TOKEN) as server:
        yield server.url


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(len(BODIES))]
    for path, body in zip(paths, BODIES, strict=True):
        path.write_bytes(body)
    return paths


class CutOff:
    """Stands before a server, and cuts every connection as the second request comes on it: as a server that closes an
    idle connection in that moment does. Counts connections."""

    def __init__(self, port: int) -> None:
        self.n_connections = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.n_connections += 1
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            is_answered = False
            while True:
                readable, _, _ = select.select([client, server], [], [])
                if client in readable and is_answered:
                    return  # what has come is not read: the client is told with a reset
                data = readable[0].recv(65_536)
                if not data:
                    return
                is_answered |= readable[0] is server
                (client if readable[0] is server else server).sendall(data)


@pytest.fixture
def cut_off(url: str) -> Iterator[CutOff]:
    relay = CutOff(int(url.rpartition(":")[2]))
    yield relay
    relay.close()


def test_a_request_on_a_connection_that_the_server_has_just_closed_is_sent_again(cut_off: CutOff) -> None:
    with Client(cut_off.url) as client:
        assert client.classify(BODIES[0]).label in CLASS_NAMES
        assert client.classify(BODIES[0]).label in CLASS_NAMES
        assert list(client.stream(BODIES[0]))[-1].label in CLASS_NAMES
    assert cut_off.n_connections == 3

    async def ask() -> None:
        client = AsyncClient(cut_off.url)
        assert (await client.classify(BODIES[0])).label in CLASS_NAMES
        assert (await client.classify(BODIES[0])).label in CLASS_NAMES
        assert [step async for step in client.stream(BODIES[0])][-1].label in CLASS_NAMES
        await client.close()

    asyncio.run(ask())
    assert cut_off.n_connections == 6


def test_the_client_makes_every_call(url: str, pictures: list[Path]) -> None:
    with Client(url, TOKEN) as client:
        answer = client.classify(BODIES[0], exit=3, top_k=4)
        assert isinstance(answer, Classification)
        assert (answer.exit, answer.reason, len(answer.top_k)) == (3, "pinned", 4)
        assert client.classify(pictures[0], exit=3).confidence == answer.confidence
        *steps, last = client.stream(BODIES[0], exit=3)
        assert [step.exit for step in steps if isinstance(step, Step)] == [1, 2]
        assert isinstance(last, LastStep)
        assert last.confidence == answer.confidence
        assert client.classify(bytearray(BODIES[0]), exit=3).confidence == answer.confidence
        assert client.classify(str(pictures[0]), exit=3).confidence == answer.confidence
        assert client.batch([]) == []
        first, bad, second = client.batch([pictures[0], b"no image", BODIES[1]], exit=2)
        assert isinstance(first, Classification)
        assert isinstance(second, Classification)
        assert isinstance(bad, BadImage)
        assert (bad.kind, bad.status) == ("not-an-image", 400)
        assert client.set_budget("fraction", 0.5).fraction == pytest.approx(0.5, abs=1e-5)
        assert client.budget().set_as == "fraction"
        limited = client.set_budget("fraction", 1.0, latency_ms=60_000)
        assert limited.latency is not None
        assert (limited.set_as, limited.latency.target_ms) == ("fraction", 60_000)
        assert client.set_budget("fraction", 1.0).latency is None
        model = client.model()
        assert model.class_names == CLASS_NAMES
        assert len(model.exits) == answer.exits


def test_the_awaited_client_makes_every_call(url: str) -> None:
    async def calls() -> None:
        async with AsyncClient(url, TOKEN) as client:
            answers = await asyncio.gather(*(client.classify(body, exit=4) for body in BODIES))
            assert [answer.exit for answer in answers] == [4, 4, 4]
            lines = [line async for line in client.stream(BODIES[0], exit=4)]
            assert [line.exit for line in lines] == [1, 2, 3, 4]
            assert lines[-1].confidence == answers[0].confidence
            assert await client.batch([]) == []
            batch = await client.batch(BODIES, exit=4)
            assert [item.confidence for item in batch if isinstance(item, Classification)] == [
                answer.confidence for answer in answers
            ]
            assert (await client.set_budget("fraction", 1.0)).fraction == (await client.budget()).fraction
            assert (await client.model()).class_names == CLASS_NAMES
            with pytest.raises(BadImage):
                await client.classify(b"")
            with pytest.raises(BadRequest):
                _ = [line async for line in client.stream(BODIES[0], exit=9)]

    asyncio.run(calls())


def test_what_is_refused_is_an_exception_that_says_why(url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        with pytest.raises(BadImage, match="not a PNG, JPEG") as image:
            client.classify(b"no image")
        assert image.value.document["request_id"]
        with pytest.raises(BadRequest, match="integer from 1 to 4") as parameter:
            client.classify(BODIES[0], exit=9)
        assert not isinstance(parameter.value, BadImage)
        assert parameter.value.kind == "bad-parameter"
        with pytest.raises(BadImage):
            list(client.stream(b"no image"))
        with pytest.raises(NotAllowed, match="admin token"):
            client.set_budget("fraction", 0.5)
        with pytest.raises(FileNotFoundError):
            client.classify(tmp_path / "nothing.png")
        with pytest.raises(TypeError, match=r"not of type Image: encode it as PNG or JPEG"):
            client.classify(Image.new("RGB", (8, 8)))  # type: ignore[arg-type]
    for no_url in ("127.0.0.1:8000", "localhost:8000", ""):
        with pytest.raises(Unreachable, match=r"is no URL of a server .* looks like http://127\.0\.0\.1:8000"):
            Client(no_url).budget()
    with Client("http://127.0.0.1:1") as nobody, pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 cannot be reached"):
        nobody.budget()


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (429, "overloaded", Overloaded),
        (503, "not-ready", NotReady),
        (504, "deadline-passed", DeadlinePassed),
        (500, "engine-error", ServerFault),
        (415, "animated-image", BadImage),
        (415, "unsupported-media-type", BadRequest),
        (413, "image-too-large", BadImage),
        (401, "token-required", NotAllowed),
    ],
)
def test_every_problem_has_its_class(status: int, kind: str, expected: type[Refused]) -> None:
    document = {"type": "urn:exitserve:problem:" + kind, "status": status, "detail": "why", "request_id": "1"}
    error = refusal(document, 2.0)
    assert type(error) is expected
    assert (str(error), error.kind, error.status, error.retry_after_s) == ("why", kind, status, 2.0)
    # Of a batch or a stream, where no head says it: to the millisecond.
    assert refusal({**document, "retry_after_s": 0.125}).retry_after_s == 0.125


def test_another_server_is_told_apart() -> None:
    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/model" else 418)
            self.end_headers()
            self.wfile.write(b"{}")

        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.rfile.read(int(self.headers["content-length"])))

        def log_message(self, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Client(f"http://127.0.0.1:{server.server_port}") as client:
                with pytest.raises(ServerError, match="is no ModelDescription"):
                    client.model()
                with pytest.raises(ServerError, match="418 without a problem"):
                    client.budget()
                for echo in (b"hello", b"[]", b"1", b'{"final": false}', b'{"detail": "no kind"}'):
                    with pytest.raises(ServerError, match="a line of its stream is no step"):
                        list(client.stream(echo))
        finally:
            server.shutdown()
            thread.join()


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_from_a_bundle(
    folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = pictures[0].with_name("notes.txt")
    bad.write_text("no picture")
    files = [*pictures, bad, bad.with_name("absent.png"), bad.parent]
    arguments = [*map(str, files), "--bundle", str(folder), "--exit", "2"]
    assert command.main([*arguments, "--top-k", "2"]) == 1
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0].split() == ["image", "label", "confidence", "exit", "reason", "MFLOPs", "ms"]
    assert len(lines) == 1 + 2 * len(pictures) + 2
    assert str(pictures[0]) in lines[1]
    assert "2/4" in lines[1]
    assert "pinned" in lines[1]
    assert "3 images by tiny-random" in lines[-1]
    assert "notes.txt: The 10 bytes sent are not" in told.err
    assert "absent.png: The file cannot be read: No such file" in told.err
    assert f"{bad.parent}: This is a folder: give the pictures in it" in told.err


def test_the_command_asks_a_server_the_same(
    url: str, folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    there = [*map(str, pictures), "--json", "--exit", "3", "--url", url]
    here = [*map(str, pictures), "--json", "--exit", "3", "--bundle", str(folder)]
    answers = []
    for arguments in (there, here):
        assert command.main(arguments) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["image"] for line in lines] == list(map(str, pictures))
        answers.append([(line["answer"]["label"], line["answer"]["confidence"]) for line in lines])
    assert answers[0] == answers[1]


def test_the_command_says_what_is_wrong(folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(pictures[0])
    for arguments, says in (
        (["--bundle", str(folder / "nothing")], "nothing"),
        (["--bundle", str(folder), "--exit", "7"], "error: exit is '7' and has to be an integer from 1 to 4"),
        (["--bundle", str(folder), "--budget-fraction", "0.01"], "give a value from"),
        (["--bundle", str(folder), "--budget-fraction", "0"], "give a value from"),
        (["--url", "http://127.0.0.1:1"], "Leave --url out"),
        (["--url", "http://127.0.0.1:1", "--budget-fraction", "0.5"], "has its own budget"),
    ):
        assert command.main([picture, *arguments]) == 2
        told = capsys.readouterr()
        assert told.err.startswith("error: ")
        assert says in told.err
        assert told.out == ""


def test_the_command_counts_images_on_a_terminal(
    folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert command.main([*map(str, pictures), "--bundle", str(folder)]) == 0
    told = capsys.readouterr()
    assert "\r1 of 3 images\r2 of 3 images\r" in told.err
    assert "of 3 images" not in told.out


def test_it_is_part_of_the_service_command_and_takes_no_torch(folder: Path, pictures: list[Path]) -> None:
    code = (
        "import sys; from service.__main__ import main; "
        f"assert main(['classify', {str(pictures[0])!r}, '--bundle', {str(folder)!r}]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "1 image by tiny-random" in result.stdout
