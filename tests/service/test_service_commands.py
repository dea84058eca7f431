"""`python -m service`: the `classify` command, and how every command handles output that cannot be written."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx
import pytest

from service import command
from service.command_line import load_settings
from service.engine.engine import Engine
from service.runners.base import RunnerError, StageOutput
from service.runners.blocks import RowState
from service.runners.onnx import OnnxRunner
from tests.bundles import random_images
from tests.service.apps import PNG, png
from tests.service.process import REPOSITORY, environment
from tests.service.process import command as program
from tests.service.sockets import Here
from tests.waiting import LIMIT_S, wait_until

BODIES = [png(image) for image in random_images(3, seed=29)]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(len(BODIES))]
    for path, body in zip(paths, BODIES, strict=True):
        path.write_bytes(body)
    return paths


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
    assert f"{bad.parent}: This is a folder: give the images in it" in told.err


def test_an_engine_that_refuses_is_no_crash(
    folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three failures in a row the engine refuses all further images."""
    start, prepare = Engine.start, OnnxRunner.prepare
    started: list[Engine] = []

    def start_well(engine: Engine) -> None:
        start(engine)
        started.append(engine)

    def fail_later(runner: OnnxRunner, stage: int, rows: Sequence[RowState]) -> Callable[[], StageOutput]:
        if started:
            raise RunnerError("no memory")
        return prepare(runner, stage, rows)

    monkeypatch.setattr(Engine, "start", start_well)
    monkeypatch.setattr(OnnxRunner, "prepare", fail_later)
    monkeypatch.setattr(command, "AT_ONCE", 1)
    files = [str(path) for path in pictures * 4]
    assert command.main([*files, "--bundle", str(folder)]) == 1
    told = capsys.readouterr().err
    assert told.count(": No answer: ") == len(files)
    assert "No answer: no stage can be run: every batch fails (no memory)." in told


def test_the_command_gets_the_same_answers_from_a_server(
    here: Here, folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for where in (("--url", here.url), ("--bundle", str(folder))):
        arguments = [*map(str, pictures), "--json", "--exit", "3", *where]
        assert command.main(arguments) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["image"] for line in lines] == list(map(str, pictures))
        answers.append([(line["answer"]["label"], line["answer"]["confidence"]) for line in lines])
    assert answers[0] == answers[1]
    for line in lines:  # without a server, all times of an image are known
        times = line["answer"]["timings"]
        assert times.pop("total_ms") == pytest.approx(sum(times.values()), abs=0.01)


def test_the_command_says_what_is_wrong(folder: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(pictures[0])
    for arguments, says in (
        (["--bundle", str(folder / "nothing")], "nothing"),
        (["--bundle", str(folder), "--exit", "7"], "error: exit is '7' but must be an integer from 1 to 4"),
        (["--bundle", str(folder), "--budget-fraction", "0.01"], "give a value from"),
        (["--bundle", str(folder), "--budget-fraction", "0"], "give a value from"),
        (["--url", "http://127.0.0.1:1"], "Leave --url out"),
        (["--url", "http://127.0.0.1:abc"], "'http://127.0.0.1:abc' is no URL of a server (Invalid port: 'abc')"),
        (["--url", "http://[::1"], "looks like http://127.0.0.1:8000. Leave --url out"),
        (["-", "-"], "holds one image: give it once"),
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


def test_it_is_a_subcommand_of_the_service_and_imports_no_torch(folder: Path, pictures: list[Path]) -> None:
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


def test_one_picture_may_come_from_standard_input(
    here: Here, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in (("--url", here.url), ("--bundle", str(folder))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(BODIES[0])))
        assert command.main(["-", "--json", *where]) == 0
        line = json.loads(capsys.readouterr().out)
        assert (line["image"], line["error"]) == ("-", None)


def test_answers_received_before_the_server_is_lost_are_printed(
    here: Here, pictures: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = httpx.post(here.url + "/classify", content=BODIES[0], headers=PNG).content
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n"

    def answer_once() -> None:
        connection, _ = listener.accept()
        listener.close()
        with connection:
            received = b""
            while not received.endswith(BODIES[0]):
                received += connection.recv(65536)
            connection.sendall(head.encode() + answer)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = threading.Thread(target=answer_once)
        server.start()
        assert command.main([*map(str, pictures), "--url", url]) == 2
        server.join(LIMIT_S)
    told = capsys.readouterr()
    assert str(pictures[0]) in told.out
    assert "1 image by tiny-random" in told.out
    assert told.err.startswith("\r1 of 3 images\r\033[Kerror: http://127.0.0.1:")


# --- common to all commands ---------------------------------------------------------------------------------------


def shell(line: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the program through the shell, with `line` redirecting its standard streams."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {line}', "sh", *program(*arguments)],
        cwd=REPOSITORY,
        env=environment(**more),
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("line", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")])
def test_an_unwritable_standard_output_is_reported_in_one_line(
    folder: Path, pictures: list[Path], line: str, why: str, unbuffered: str
) -> None:
    for arguments in (["classify", str(pictures[0]), "--bundle", str(folder)], ["--version"])[: 1 if unbuffered else 2]:
        done = shell(line, *arguments, PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (1, f"error: standard output cannot be written: {why}\n")


@pytest.mark.parametrize(("encoding", "form"), [("latin-1", []), ("utf-8", ["--json"])])
def test_file_names_that_cannot_be_encoded_are_escaped(
    folder: Path, tmp_path: Path, encoding: str, form: list[str]
) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/f\xff\xe9\x9b\xaa.png")
    Path(path).write_bytes(BODIES[0])
    done = subprocess.run(
        program("classify", path, "--bundle", str(folder), *form),
        cwd=REPOSITORY,
        env=environment(PYTHONIOENCODING=encoding),
        capture_output=True,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"udcff" in done.stdout


def test_closed_standard_input_is_reported(folder: Path) -> None:
    done = shell("<&- >/dev/null", "classify", "-", "--bundle", str(folder))
    assert (done.returncode, done.stderr) == (1, "-: The file cannot be read: Bad file descriptor.\n")


@pytest.mark.parametrize(("workers", "line"), [("0", ">/dev/full"), ("0", ""), ("2", ">&- <&-")])
def test_a_server_serves_even_if_it_cannot_print_that_it_is_ready(
    folder: Path, tmp_path: Path, pictures: list[Path], workers: str, line: str
) -> None:
    log = tmp_path / "log"
    reading, writing = os.pipe()
    os.close(reading)  # nothing reads the output
    arguments = ["--bundle", str(folder), "--port", "0", "--http-workers", workers, "--access-log", "off"]
    with log.open("w") as stderr, os.fdopen(writing, "w") as pipe:
        process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {line}', "sh", *program(*arguments)],
            cwd=REPOSITORY,
            env=environment(),
            stdout=pipe,
            stderr=stderr,
        )
    try:
        wait_until("it is ready", lambda: "is ready on http://" in log.read_text() or process.poll() is not None)
        told = next(line for line in log.read_text().splitlines() if "is ready on" in line)
        assert "standard output cannot be written" in told
        url = next(word for word in told.split() if word.startswith("http://"))
        assert command.main([str(pictures[0]), "--url", url]) == 0
        process.terminate()
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
    assert "stopped: 1 answered, 0 abandoned, 0 failed" in log.read_text()


def test_a_subcommand_must_precede_all_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--port", "9102", "classify", "x.png"], ["--url", "http://127.0.0.1:1", "classify", "x.png"]):
        with pytest.raises(SystemExit) as exit_info:
            load_settings(arguments)
        assert exit_info.value.code == 2
        told = capsys.readouterr().err
        assert "'classify' must come first, before any option: python -m service classify ..." in told


def test_it_prints_its_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as exit_info:
        load_settings(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"exitserve {version('exitserve')}\n"

    def not_installed(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr("service.command_line.version", not_installed)
    with pytest.raises(SystemExit):
        load_settings(["--version"])
    assert "the package is not installed" in capsys.readouterr().out
