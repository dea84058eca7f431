"""A real server process: it starts fast and without torch, or reports in one line what is wrong."""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from models.bundle import load_bundle
from service.engine.policies import POLICIES
from tests.bundles import random_images, seal
from tests.service.apps import PNG, png
from tests.service.process import REPOSITORY, command, environment, running_server
from tests.waiting import LIMIT_S

BODY = png(random_images(1, seed=41)[0])
STARTED_WITHIN_S = 5.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_it_answers_soon_after_its_start_and_without_torch(bundle_path: Path, log: Path) -> None:
    with running_server(bundle_path, log) as server:
        response = httpx.post(server.url + "/classify", content=BODY, headers=PNG)
        assert response.status_code == 200
        assert httpx.get(server.url + "/readyz").status_code == 200
        # CPU time, since the wall time depends on what else runs.
        assert cpu_seconds(server.process.pid) < STARTED_WITHIN_S
        assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
        assert server.stop() == 0
    assert "Traceback" not in log.read_text()


SHOWING = """
import sys
from service import __main__, assembly
build = assembly.build_engine

def build_and_show(*args, **kwargs):
    engine = build(*args, **kwargs)
    print(engine._core.scheduler.policy, file=sys.stderr)
    return engine

assembly.build_engine = build_and_show
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_every_setting_of_engine_budget_and_limits_takes_effect(bundle_path: Path, log: Path) -> None:
    frontier = load_bundle(bundle_path).frontier()
    accuracy = (frontier.accuracy[0] + frontier.best_accuracy[-1]) / 2
    budget = ("--budget-accuracy", str(accuracy), "--burst-images", "77.5", "--latency-ms", "2500")
    batches = ("--device", "cpu", "--lanes", "3", "--max-batch-rows", "5", "--scheduling-policy", "merge-full")
    limits = ("--max-in-flight", "9", "--max-queue-s", "1e-9", "--max-pixels", "1500", "--keep-alive-s", "0.3")
    program = (sys.executable, "-c", SHOWING)
    with running_server(bundle_path, log, *budget, *batches, *limits, program=program) as server:
        state = httpx.get(server.url + "/budget").json()
        assert (state["set_as"], state["accuracy"]) == ("accuracy", pytest.approx(accuracy, abs=1e-3))
        assert state["ledger"]["burst_images"] == 77.5
        assert state["latency"]["target_ms"] == 2500
        metrics = httpx.get(server.url + "/metrics").text.splitlines()
        assert 'exitserve_max_batch_rows{stage="1"} 5.0' in metrics
        assert "exitserve_room_rows 9.0" in metrics
        assert httpx.post(server.url + "/classify", content=BODY, headers=PNG).status_code == 200
        # As the wait may be next to nothing, there is room for two images per lane.
        assert "exitserve_room_rows 6.0" in httpx.get(server.url + "/metrics").text.splitlines()
        large = png(np.zeros((40, 40, 3), np.uint8))
        assert httpx.post(server.url + "/classify", content=large, headers=PNG).status_code == 413
        with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as idle:
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"alive" in idle.makefile("rb").read()  # until it is closed, sooner than by default
    assert str(POLICIES["merge-full"]) in log.read_text().splitlines()


def start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=REPOSITORY, env=environment(**variables), capture_output=True, text=True, timeout=60
    )


def test_a_port_in_use_is_reported_in_one_line(bundle_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = start("--bundle", str(bundle_path), "--port", str(port))
    assert result.returncode == 1
    assert result.stderr == (
        f"error: cannot listen on 127.0.0.1 port {port}: Address already in use. Choose another with --port (0 takes a "
        "free one).\n"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--port", "eighty"), "--port (EXITSERVE_PORT) 'eighty'"),
        (("--budget-mflops", "1000000"), "give a value from"),
        (("--admin-token-file", "/nowhere/token"), "No such file"),
        (("--host", "no.such.host.invalid"), "--host"),
        (("--host", "192.0.2.1"), "with --host"),
    ],
)
def test_wrong_settings_are_reported_in_one_line(bundle_path: Path, arguments: tuple[str, ...], told: str) -> None:
    result = start("--bundle", str(bundle_path), "--port", "0", *arguments)
    assert result.returncode in (1, 2)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert told in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("damage", ["absent", "manifest", "stage"])
def test_an_unusable_bundle_is_reported_in_one_line(bundle_path: Path, damage: str) -> None:
    if damage == "absent":
        bundle_path = bundle_path / "nowhere"
    elif damage == "manifest":
        (bundle_path / "manifest.json").write_text("{}")
    else:
        (bundle_path / "stages" / "stage_2.onnx").write_bytes(b"nonsense")
    result = start("--bundle", str(bundle_path), "--port", "0")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert str(bundle_path) in result.stderr


REPLACING = """
import os, sys
from service import __main__, assembly
old, new, *arguments = sys.argv[1:]
build = assembly.build_engine

def build_and_replace(*args, **kwargs):
    engine = build(*args, **kwargs)
    os.rename(old, old + "-old")
    os.rename(new, old)
    return engine

assembly.build_engine = build_and_replace
sys.exit(__main__.main(["--bundle", old, *arguments]))
"""


def test_a_bundle_that_is_replaced_while_it_is_opened_is_not_served(bundle_path: Path, tmp_path: Path) -> None:
    """It would mix the stages of one bundle with the thresholds of another, which its answers would not show."""
    new = Path(shutil.copytree(bundle_path, tmp_path / "new"))
    (new / "README.md").write_text("trained on")
    seal(new)
    arguments = [sys.executable, "-c", REPLACING, str(bundle_path), str(new), "--port", "0"]
    result = subprocess.run(
        arguments, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=LIMIT_S
    )
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {bundle_path}: another bundle was put there while this one was opened; start again\n"
    )


@contextmanager
def loading(folder: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    """A server that is still starting: it reads its token from a pipe to which nothing is written."""
    pipe = folder / "token"
    os.mkfifo(pipe)
    arguments = [*before, *command("--port", "0", "--admin-token-file", str(pipe))]
    started = subprocess.Popen(arguments, cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, text=True)
    with started, pipe.open("w"):  # opens when the server reads
        yield started
        started.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_it_at_once_without_a_traceback(tmp_path: Path, number: signal.Signals) -> None:
    with loading(tmp_path) as started:
        started.send_signal(number)
        _, log = started.communicate(timeout=LIMIT_S)
    assert started.returncode == -number
    assert log == ""


IN_A_CONTAINER = ("unshare", "--pid", "--fork", "--kill-child")


def may_be_first() -> bool:
    return sys.platform == "linux" and subprocess.run([*IN_A_CONTAINER, "true"], check=False).returncode == 0


@pytest.mark.skipif(not may_be_first(), reason="to be the first process of a namespace needs unshare, as root")
def test_a_signal_while_loading_ends_it_as_pid_1_of_a_container(tmp_path: Path) -> None:
    """To PID 1, the kernel delivers only signals that have a handler."""
    with loading(tmp_path, *IN_A_CONTAINER) as unshare:
        (first,) = map(int, Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split())
        os.kill(first, signal.SIGTERM)
        _, log = unshare.communicate(timeout=LIMIT_S)
    assert unshare.returncode == 128 + signal.SIGTERM
    assert log == ""


def test_the_token_is_never_logged(bundle_path: Path, log: Path) -> None:
    token = "correct-horse-battery"
    with running_server(
        bundle_path, log, "--access-log", "json", "--log-level", "debug", EXITSERVE_ADMIN_TOKEN=token
    ) as server:
        asked = {"json": {"fraction": 0.5}, "headers": {"Authorization": f"Bearer {token}"}}
        assert httpx.put(server.url + "/budget", **asked).status_code == 200  # type: ignore[arg-type]
        assert httpx.put(server.url + "/budget", json={"fraction": 0.5}).status_code == 401
        assert server.stop() == 0
    text = log.read_text()
    assert "PUT /budget" in text
    assert token not in text


def test_the_service_imports_no_torch() -> None:
    code = (
        "import sys, service.__main__, service.api.app, service.assembly, service.server\n"
        "assert 'torch' not in sys.modules and 'training' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives threads heaps of their own")
def test_all_threads_share_one_heap(tmp_path: Path) -> None:
    told = tmp_path / "heaps.xml"
    code = (
        "import ctypes, sys, threading\n"
        "from service.server import use_one_heap\n"
        "if sys.argv[2] == 'one': use_one_heap()\n"
        "libc, all_there = ctypes.CDLL(None), threading.Barrier(8)\n"
        "libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p\n"
        "def work():\n"
        "    libc.malloc(1000)\n"
        "    all_there.wait()\n"
        "threads = [threading.Thread(target=work) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b'w'))\n"
        "libc.malloc_info(0, file)\n"
        "libc.fclose(file)\n"
    )
    heaps = {}
    for kind in ("one", "many"):
        subprocess.run([sys.executable, "-c", code, str(told), kind], cwd=REPOSITORY, check=True, timeout=LIMIT_S)
        heaps[kind] = told.read_text().count("<heap nr=")
    assert heaps["one"] == 1 < heaps["many"]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_broken_pipe_prints_no_error(bundle_path: Path, more: list[str]) -> None:
    """As in `... | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    pictures = [str(REPOSITORY / "examples/images/fox.png")] * 3
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            command("classify", *pictures, "--bundle", str(bundle_path), *more),
            cwd=REPOSITORY,
            env=environment(),
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "")
