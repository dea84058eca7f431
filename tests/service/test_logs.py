"""The output of a server: its log and nothing else, and what happens when nobody reads it."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tty
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import httpx
import pytest

from service.logs import JsonFormatter, Outlet, OutletHandler
from tests.bundles import random_images
from tests.service.apps import PNG, png
from tests.service.process import PROGRAM, REPOSITORY, environment, running_server
from tests.waiting import LIMIT_S

# EXIF data with invalid entries: Pillow warns of each, with a different text each time.
WARNED = """
import io, struct, sys
from PIL import Image
from service.images.decoder import ImageDecoder
from service.logs import set_up_logs

set_up_logs("debug", as_json=True)
decoder = ImageDecoder(8, 8, max_pixels=10_000)
for i in range(3):
    entries = b"".join(struct.pack("<HHLL", tag, 7, 1000 + 100 * i + tag, 60_000) for tag in range(1, 90))
    exif = b"Exif\\0\\0II*\\0\\x08\\0\\0\\0" + struct.pack("<H", 89) + entries
    for file_format in ("PNG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (20, 20)).save(file, file_format, exif=exif)
        assert decoder.decode_now(file.getvalue()).shape == (8, 8, 3)
print(len(getattr(sys.modules["PIL.TiffImagePlugin"], "__warningregistry__", {})))
"""


def test_warnings_of_pillow_are_neither_printed_nor_kept_in_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WARNED], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert int(done.stdout) <= 1  # the registry's own "version" entry


def test_file_names_that_are_not_utf_8_can_be_logged() -> None:
    record = logging.LogRecord("service", logging.ERROR, __file__, 1, "not read: %s", ("b\udcff",), None)
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert '"level":"error"' in line
    assert json.loads(line)["message"] == "not read: b\udcff"


@pytest.fixture(params=["pipe", "terminal", "socket"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Both ends of something that has room for a few lines: one to read (it does not block), one to write."""
    monkeypatch.setattr("service.logs.PATIENCE_S", 0.01)
    if request.param == "pipe":
        reading, writing = os.pipe()
    elif request.param == "terminal":
        reading, writing = os.openpty()
        tty.setraw(writing)  # otherwise it changes line ends
    else:
        reading, writing = (end.detach() for end in socket.socketpair())
    os.set_blocking(reading, False)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def read_all(descriptor: int) -> bytes:
    data = b""
    try:
        while piece := os.read(descriptor, 65536):
            data += piece
    except BlockingIOError:
        pass
    return data


def test_lines_that_are_not_read_are_lost_and_counted(ends: tuple[int, int]) -> None:
    reading, writing = ends
    logger = logging.Logger("test")
    handler = OutletHandler(Outlet(writing))
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    n = 0
    while not handler._n_lost:
        logger.info("line %d", n)
        n += 1
    for i in range(9):
        logger.info("lost %d", i)
    log = read_all(reading)
    logger.info("again")
    logger.info("and again")
    log += read_all(reading)
    documents = [line for line in log.splitlines() if line.endswith(b"}")]  # the first lost line may be cut
    assert [json.loads(line)["message"] for line in documents] == [
        *(f"line {i}" for i in range(n - 1)),
        "10 lines of the log are missing here: standard error was not read",
        "again",
        "and again",
    ]


def test_a_line_longer_than_the_room_is_cut_and_the_next_begins_at_a_line(ends: tuple[int, int]) -> None:
    reading, writing = ends
    outlet = Outlet(writing)
    assert not outlet.put(1_000_000 * "x")
    begun = read_all(reading)
    assert 0 < len(begun) < 1_000_000
    assert outlet.put("next")
    assert set(begun) == {ord("x")}
    assert read_all(reading) == b"\nnext\n"


def test_a_reader_that_is_behind_is_waited_for(ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.logs.PATIENCE_S", LIMIT_S)
    reading, writing = ends
    outlet = Outlet(writing)
    lines = 300 * [1000 * "x"]
    expected = "".join(f"{line}\n" for line in lines).encode()

    def read_late() -> bytes:
        sleep(0.05)  # so that there is no room left; if there still is, the test only checks less
        os.set_blocking(reading, True)
        data = b""
        while len(data) < len(expected):
            data += os.read(reading, 65536)
        return data

    with ThreadPoolExecutor(1) as reader:
        data = reader.submit(read_late)
        for line in lines:
            assert outlet.put(line)
        assert data.result(LIMIT_S) == expected


@pytest.fixture
def full_pipe(tmp_path: Path) -> Iterator[Path]:
    """A pipe without room, which nobody reads."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    ours = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(ours, b"\n")
    yield path
    assert set(read_all(ours)) == set(b"\n")
    os.close(ours)


def logging_to(pipe: Path) -> tuple[str, ...]:
    return ("sh", "-c", 'exec "$@" 2> "$0"', str(pipe), *PROGRAM)


@pytest.mark.parametrize("arguments", [[], ["--http-workers", "2", "--lanes", "1"]], ids=["one process", "workers"])
def test_a_server_whose_log_nobody_reads_answers_and_stops(
    bundle_path: Path, tmp_path: Path, full_pipe: Path, arguments: list[str]
) -> None:
    with running_server(bundle_path, tmp_path / "log", *arguments, program=logging_to(full_pipe)) as server:
        for image in random_images(10, seed=1):
            response = httpx.post(server.url + "/classify", content=png(image), headers=PNG, timeout=LIMIT_S)
            assert response.status_code == 200
        assert server.stop() == 0


def test_a_server_that_cannot_start_ends_even_if_nobody_reads_why(full_pipe: Path) -> None:
    arguments = [*logging_to(full_pipe), "--bundle", "nowhere", "--port", "0"]
    assert subprocess.run(arguments, cwd=REPOSITORY, env=environment(), timeout=LIMIT_S).returncode == 2
