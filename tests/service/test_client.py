"""The Python client and the `classify` command against a real server process."""

import asyncio
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

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
from tests.bundles import CLASS_NAMES, random_images, tiny_bundle
from tests.service.apps import png
from tests.service.process import REPOSITORY, environment, running_server

BODIES = [png(image) for image in random_images(3, seed=29)]
TOKEN = "a-token-for-tests"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


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


def test_another_server_is_told_apart(tmp_path: Path) -> None:
    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/model" else 418)
            self.end_headers()
            self.wfile.write(b"{}")

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
        finally:
            server.shutdown()
            thread.join()


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_from_a_bundle(
    folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = pictures[0].with_name("notes.txt")
    bad.write_text("no picture")
    arguments = [*map(str, [*pictures, bad, bad.with_name("absent.png")]), "--bundle", str(folder), "--exit", "2"]
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
        (["--bundle", str(folder), "--exit", "7"], "integer from 1 to 4"),
        (["--bundle", str(folder), "--budget-fraction", "0.01"], "give a value from"),
        (["--url", "http://127.0.0.1:1"], "Leave --url out"),
        (["--url", "http://127.0.0.1:1", "--budget-fraction", "0.5"], "has its own budget"),
    ):
        assert command.main([picture, *arguments]) == 2
        told = capsys.readouterr()
        assert told.err.startswith("error: ")
        assert says in told.err
        assert told.out == ""


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
