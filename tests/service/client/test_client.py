"""The Python client against a real server process."""

import asyncio
import http.server
import io
import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

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
from tests.service.process import running_server

PIXELS = random_images(3, seed=29)
BODIES = [png(image) for image in PIXELS]
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
    """A proxy that cuts every connection when its second request arrives, like a server that closes an idle
    connection at that moment. Counts connections."""

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
                    return  # unread data makes the close a reset
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


def test_a_request_on_a_just_closed_connection_is_resent(cut_off: CutOff) -> None:
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
        any_will_do = client.classify(BODIES[0], min_confidence=0.0)
        assert (any_will_do.exit, any_will_do.reason) == (1, "confident")
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
        assert client.set_budget("fraction", 0.5).latency is None
        target_alone = client.set_budget(latency_ms=60_000)
        assert target_alone.latency is not None
        assert (target_alone.fraction, target_alone.latency.target_ms) == (1.0, 60_000)
        assert client.set_budget("fraction", 1.0).latency is None
        model = client.model()
        assert model.class_names == CLASS_NAMES
        assert len(model.exits) == answer.exits


def test_the_async_client_makes_every_call(url: str) -> None:
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


def test_refusals_raise_exceptions_with_the_reason(url: str, tmp_path: Path) -> None:
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
    with Client("http://127.0.0.1:1") as nobody, pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 cannot be reached"):
        nobody.budget()


def test_an_image_may_be_a_file_a_path_bytes_or_pixels(url: str, pictures: list[Path], tmp_path: Path) -> None:
    pixels = Image.fromarray(PIXELS[0])
    with Client(url) as client, pictures[0].open("rb") as file:
        answer = client.classify(BODIES[0], exit=3)
        mirrored = PIXELS[0][:, ::-1].copy()[:, ::-1]  # the same, not as it lies in memory
        forms = [file, io.BytesIO(BODIES[0]), bytearray(BODIES[0]), str(pictures[0]), pixels, PIXELS[0], mirrored]
        assert [client.classify(form, exit=3).confidence for form in forms] == [answer.confidence] * len(forms)
        for mode in ("CMYK", "L", "RGBA", "I;16", "P"):
            assert client.classify(pixels.convert("L" if mode == "I;16" else "RGB").convert(mode)).label in CLASS_NAMES
        turned = pixels.transpose(Image.Transpose.ROTATE_90)  # as from a rotated camera, with the orientation in EXIF
        turned.getexif()[0x0112] = 6
        assert client.classify(turned, exit=3).confidence == answer.confidence
        file.seek(0)
        named = client.batch([file, PIXELS[0], pixels], exit=3)
        assert [item.confidence for item in named if isinstance(item, Classification)] == [answer.confidence] * 3
        latin = Path(os.fsdecode(b"%b/caf\xe9.png" % os.fsencode(tmp_path)))  # a name that is no UTF-8
        latin.write_bytes(BODIES[0])
        assert [type(item) for item in client.batch([latin])] == [Classification]
        assert len(client.batch(PIXELS, exit=3)) == len(PIXELS)  # type: ignore[arg-type]  # an array of several
        with pictures[0].open(encoding="latin-1") as text, pytest.raises(TypeError, match="a file opened as binary"):
            client.classify(text)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="and not of type NoneType"):
            client.classify(None)  # type: ignore[arg-type]
        for wrong in (PIXELS, PIXELS[0] / 255, PIXELS[0].transpose(2, 0, 1), PIXELS[0][:0]):
            with pytest.raises(ValueError, match=r"is uint8 \[height, width, 3\], and not (uint8|float64) \["):
                client.classify(wrong)
        with pytest.raises(ValueError, match="no pixels"):
            client.classify(Image.new("RGB", (0, 8)))


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
def test_every_problem_has_its_exception_class(status: int, kind: str, expected: type[Refused]) -> None:
    document = {"type": "urn:exitserve:problem:" + kind, "status": status, "detail": "why", "request_id": "1"}
    error = refusal(document, 2.0)
    assert type(error) is expected
    assert (str(error), error.kind, error.status, error.retry_after_s) == ("why", kind, status, 2.0)
    # Of a batch or a stream, where no head says it: to the millisecond.
    assert refusal({**document, "retry_after_s": 0.125}, 1.0).retry_after_s == 0.125  # which is more precise


def test_answers_of_other_servers_are_recognised() -> None:
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
