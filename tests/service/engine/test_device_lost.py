"""A real server process whose device is lost: waiting requests get 503, and the process ends, to be restarted."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from time import monotonic

import httpx
import pytest

from tests.bundles import random_images
from tests.service.apps import PNG, png
from tests.service.process import REPOSITORY, environment
from tests.waiting import LIMIT_S, wait_until

N_CLIENTS = 8
# The server's own code, except that the device is lost in the first batch that runs after the file `go` exists (at
# warm-up, if it exists at the start), and that its clean-up aborts the process, as CUDA's may.
PROGRAM = """
import atexit, os, sys, time
from pathlib import Path
from service.runners.base import FatalRunnerError
from service.runners.onnx import OnnxRunner
from service.__main__ import main

prepare, warm_up, go, warmed = OnnxRunner.prepare, OnnxRunner.warm_up, Path(sys.argv[1]), []

def lose_it_once_warm(self, stage, rows):
    if not warmed:
        return prepare(self, stage, rows)
    while not go.exists():
        time.sleep(0.01)
    raise FatalRunnerError("CUDA error: an illegal memory access was encountered")

def warm_up_and_then_lose_it(self, limit_s=1.0):
    if go.exists():
        raise FatalRunnerError("CUDA error: an illegal memory access was encountered")
    times = warm_up(self, limit_s)
    warmed.append(True)
    return times

atexit.register(os.abort)
OnnxRunner.prepare = lose_it_once_warm
OnnxRunner.warm_up = warm_up_and_then_lose_it
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("options", [[], ["--http-workers", "1"]])
def test_a_device_lost_at_warm_up_ends_the_process_with_the_cause(
    bundle_path: Path, tmp_path: Path, options: list[str]
) -> None:
    go = tmp_path / "go"
    go.touch()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            str(go),
            "--bundle",
            str(bundle_path),
            "--port",
            "0",
            "--device",
            "cpu",
            *options,
        ],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == "error: CUDA error: an illegal memory access was encountered"


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_a_lost_device_answers_503_and_ends_the_process(bundle_path: Path, tmp_path: Path) -> None:
    go, log = tmp_path / "go", tmp_path / "log"
    arguments = ["--bundle", str(bundle_path), "--port", "0", "--device", "cpu", "--lanes", "2", "--max-queue-s", "60"]
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(go), *arguments],
            cwd=REPOSITORY,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    stdout = server.stdout
    assert stdout is not None
    try:
        lines: Queue[str] = Queue()
        threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
        line = lines.get(timeout=LIMIT_S)
        assert "http://" in line, log.read_text()
        url = next(word for word in line.split() if word.startswith("http://"))
        body = png(random_images(1, seed=43)[0])
        with ThreadPoolExecutor(N_CLIENTS) as pool:
            asked = [
                pool.submit(httpx.post, f"{url}/classify", content=body, headers=PNG, timeout=LIMIT_S)
                for _ in range(N_CLIENTS)
            ]
            all_there = "exitserve_in_flight_rows 8.0"
            wait_until("all are in flight", lambda: all_there in httpx.get(f"{url}/metrics").text)
            go.touch()
            lost_s = monotonic()
            wait_until("the server is not ready", lambda: not is_ready(url))
            assert monotonic() < lost_s + 10  # a second on an idle machine
            responses = [future.result(LIMIT_S) for future in asked]
        for response in responses:
            assert response.status_code == 503
            assert response.headers["content-type"] == "application/problem+json"
            assert "illegal memory access" in response.json()["detail"]
        assert server.wait(LIMIT_S) == 1
        assert "the device is lost" in log.read_text()
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()
        stdout.close()
