"""Real processes: a server with two HTTP workers behaves like one without."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bundles import random_images, tiny_bundle
from tests.service.apps import PNG, build_app, png, problem, serving
from tests.service.process import PROGRAM, REPOSITORY, ServerProcess, environment, running_server
from tests.service.test_shutdown import slow_clients, wait_for
from tests.waiting import LIMIT_S, wait_until

BODIES = [png(image) for image in random_images(24, seed=53)]
IN_FRONT = ("--http-workers", "2", "--lanes", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    tiny_bundle(folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with running_server(folder / "bundle", folder / "log", *IN_FRONT, "--budget-fraction", "0.6") as server:
        yield server


def workers_of(server: ServerProcess) -> list[int]:
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def n_open_files(workers: list[int]) -> int:
    return sum(len(list(Path(f"/proc/{worker}/fd").iterdir())) for worker in workers)


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def answer_of(response: httpx.Response) -> Any:
    """An answer without times and ids, which differ between requests."""
    assert response.status_code == 200, response.text
    lines = [json.loads(line) for line in response.text.splitlines()]
    for line in lines:
        line.pop("timings", None)
        line.pop("request_id", None)
    return lines


def numbers(text: str) -> dict[str, float]:
    """The metrics by name and labels."""
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)}


def test_it_answers_like_a_single_process(server: ServerProcess, folder: Path) -> None:
    calls = [("/classify?top_k=10&exit=", "1"), ("/classify/stream?exit=", "4"), ("/classify?exit=", "3")]
    with serving(build_app(folder / "bundle")) as alone:
        for i, body in enumerate(BODIES):
            path = "".join(calls[i % 3])
            there = httpx.post(server.url + path, content=body, headers=PNG)
            here = alone.post(path, content=body, headers=PNG)
            if "stream" not in path:
                assert answer_of(there) == answer_of(here)
                continue
            for line, same in zip(answer_of(there), answer_of(here), strict=True):
                line.pop("threshold"), same.pop("threshold")  # they move with the budget
                assert line == same
        for path, body, kind in (
            ("/classify", b"no image", "not-an-image"),
            ("/classify?exit=9", BODIES[0], "bad-parameter"),
            ("/nowhere", b"", "not-found"),
        ):
            there = httpx.post(server.url + path, content=body, headers=PNG)
            here = alone.post(path, content=body, headers=PNG)
            assert there.status_code == here.status_code
            problem(there, here.status_code, kind)
    form = [("image", (f"{i}.png", body, "image/png")) for i, body in enumerate(BODIES)]
    batch = httpx.post(server.url + "/classify/batch", files=form).json()
    assert (batch["answered"], batch["failed"]) == (len(BODIES), 0)
    assert httpx.get(server.url + "/").status_code == httpx.get(server.url + "/docs").status_code == 200
    assert "/classify" in httpx.get(server.url + "/openapi.json").json()["paths"]


def test_no_image_of_a_form_is_refused_because_of_the_others(folder: Path, tmp_path: Path) -> None:
    form = [("image", (f"{i}.png", body, "image/png")) for i, body in enumerate(BODIES * 2)]
    with running_server(folder / "bundle", tmp_path / "log", *IN_FRONT, "--max-in-flight", "8") as server:

        def answered(_: int) -> int:
            response = httpx.post(server.url + "/classify/batch", files=form, timeout=LIMIT_S)
            return int(response.json()["answered"])

        with ThreadPoolExecutor(3) as pool:  # more forms than workers
            assert list(pool.map(answered, range(6))) == [len(form)] * 6
        metrics = numbers(httpx.get(server.url + "/metrics").text)
        assert metrics['exitserve_requests_total{outcome="overloaded"}'] == 0
        assert metrics["exitserve_in_flight_rows"] == 0


def test_every_worker_reports_the_whole_server(server: ServerProcess) -> None:
    before = numbers(httpx.get(server.url + "/metrics").text)
    served: set[str] = set()
    for body in BODIES:  # one connection each
        response = httpx.post(server.url + "/classify", content=body, headers=PNG)
        served.add(response.headers["x-request-id"].partition("-")[0])
    mflops = 0.0
    for _ in range(12):
        response = httpx.put(server.url + "/budget", json={"fraction": 0.7})
        assert response.status_code == 200
        served.add(response.headers["x-request-id"].partition("-")[0])
        shown = httpx.get(server.url + "/budget").json()
        assert shown["set_as"] == "fraction"
        assert shown["fraction"] == pytest.approx(0.7)
        after = numbers(httpx.get(server.url + "/metrics").text)
        for name, count in {
            'exitserve_requests_total{outcome="answered"}': 24,
            "exitserve_decode_seconds_count": 24,
            'exitserve_decode_seconds_bucket{le="+Inf"}': 24,
        }.items():
            assert after[name] - before[name] == count, name
        by_exit = [f'exitserve_request_seconds_count{{exit="{number}"}}' for number in range(1, 5)]
        assert sum(after[name] - before[name] for name in by_exit) == 24
        assert after["exitserve_request_mflops_count"] - before["exitserve_request_mflops_count"] == 24
        assert after["exitserve_ready"] == 1
        assert mflops in (0.0, after["exitserve_mflops_total"])
        mflops = after["exitserve_mflops_total"]
    if len(served) < 2:  # the kernel gives a connection to the first worker that accepts
        wait_until("both workers serve", lambda: len(served | {_server_of(server)}) > 1)


def _server_of(server: ServerProcess) -> str:
    return httpx.get(server.url + "/model").headers["x-request-id"].partition("-")[0]


def test_workers_load_no_engine(server: ServerProcess) -> None:
    pids = workers_of(server)
    assert len(pids) == 2
    for pid in pids:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "onnxruntime" not in maps
        assert "memfd:exitserve" in maps


def test_the_image_of_a_client_that_hangs_up_is_abandoned(server: ServerProcess) -> None:
    name = 'exitserve_requests_total{outcome="abandoned"}'
    before = numbers(httpx.get(server.url + "/metrics").text)[name]
    with slow_clients(server, 5):
        pass
    wait_until("they are counted", lambda: numbers(httpx.get(server.url + "/metrics").text)[name] == before + 5)
    assert numbers(httpx.get(server.url + "/metrics").text)["exitserve_in_flight_rows"] == 0


def test_a_worker_that_dies_is_replaced_and_its_counts_stay(server: ServerProcess) -> None:
    answered = 'exitserve_requests_total{outcome="answered"}'
    before = numbers(httpx.get(server.url + "/metrics").text)
    victim, survivor = workers_of(server)
    os.kill(victim, signal.SIGKILL)
    wait_until("another has been started", lambda: len(set(workers_of(server)) - {victim, survivor}) == 1)
    for body in BODIES:
        assert httpx.post(server.url + "/classify", content=body, headers=PNG, timeout=LIMIT_S).status_code == 200
    after = numbers(httpx.get(server.url + "/metrics").text)
    assert after[answered] == before[answered] + 24
    assert f"HTTP worker 1 (process {victim}) exited with code -9" in server.log.read_text()
    # The other one, too, so that the new worker gets all requests.
    os.kill(survivor, signal.SIGKILL)
    assert httpx.post(server.url + "/classify", content=BODIES[0], headers=PNG, timeout=LIMIT_S).status_code == 200
    assert numbers(httpx.get(server.url + "/metrics", timeout=LIMIT_S).text)[answered] == before[answered] + 25


IMPATIENT = """
import runpy
from service.front import supervisor

supervisor.LOOK_S, supervisor.STUCK_LOOKS = 0.05, 40
runpy.run_module("service", run_name="__main__")
"""


def test_a_worker_that_stops_for_good_is_replaced(folder: Path, tmp_path: Path) -> None:
    program = (sys.executable, "-c", IMPATIENT)
    with running_server(folder / "bundle", tmp_path / "log", *IN_FRONT, program=program) as server:
        stopped = workers_of(server)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        response = httpx.post(server.url + "/classify", content=BODIES[0], headers=PNG, timeout=LIMIT_S)
        assert response.status_code == 200
        wait_until("both have been replaced", lambda: not set(stopped) & set(workers_of(server)))
        assert f"(process {stopped[0]}) has not responded for 2 s" in server.log.read_text()


@pytest.mark.parametrize("to_all", [False, True])
def test_accepted_requests_are_answered_before_it_stops(folder: Path, tmp_path: Path, to_all: bool) -> None:
    """Told by SIGTERM to the parent, and as Ctrl-C and service managers tell every process at once."""
    with running_server(folder / "bundle", tmp_path / "log", *IN_FRONT) as server, slow_clients(server, 12) as clients:
        workers = workers_of(server)
        for pid in [server.process.pid, *(workers if to_all else [])]:
            os.kill(pid, signal.SIGINT if to_all else signal.SIGTERM)
        refused = wait_for(503, server.url + "/readyz")
        assert "stopping" in refused.json()["detail"]
        for client in clients:
            client.finish()
        for client in clients:
            assert client.response()[0] == 200
        assert server.process.wait(LIMIT_S) == 0
        assert not any(map(is_running, workers))
    log = (tmp_path / "log").read_text()
    assert "stopped: 12 answered, 0 abandoned, 0 failed" in log
    assert "Traceback" not in log


def test_ctrl_c_while_workers_load_is_not_an_error(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [*PROGRAM, "--bundle", str(folder / "bundle"), "--port", "0", *IN_FRONT],
            cwd=REPOSITORY,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            process_group=0,
        )
    with server:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        wait_until("its workers begin", lambda: len(children.read_text().split()) == 2)
        os.killpg(server.pid, signal.SIGINT)  # as a terminal does
        assert server.communicate(timeout=LIMIT_S)[0] == b""  # it was never ready
        assert server.returncode == 0
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("way", ["to a thread", "while it is stopped"])
def test_a_signal_that_does_not_wake_the_main_thread_is_handled(folder: Path, tmp_path: Path, way: str) -> None:
    with running_server(folder / "bundle", tmp_path / "log", *IN_FRONT) as server:
        pid = server.process.pid
        time.sleep(1.0)  # so that the main thread is waiting; if it is not yet, the test only checks less
        if way == "to a thread":
            other = next(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if int(task.name) != pid)
            assert ctypes.CDLL(None).tgkill(pid, other, signal.SIGTERM) == 0
        else:
            for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):
                os.kill(pid, number)
        assert server.process.wait(LIMIT_S) == 0


def test_a_client_that_never_finishes_its_body_does_not_block_the_stop(folder: Path, tmp_path: Path) -> None:
    arguments = (*IN_FRONT, "--drain-s", "1", "--body-timeout-s", "3600")
    with running_server(folder / "bundle", tmp_path / "log", *arguments) as server, slow_clients(server, 1):
        assert server.stop() == 1
    assert "1 requests were not answered" in (tmp_path / "log").read_text()


def test_when_the_engines_process_dies_workers_report_it_and_exit(folder: Path, tmp_path: Path) -> None:
    with running_server(folder / "bundle", tmp_path / "log", *IN_FRONT) as server, ThreadPoolExecutor() as clients:
        workers = workers_of(server)
        assert all(map(is_running, workers))
        with httpx.Client(base_url=server.url, timeout=LIMIT_S) as client:
            server.process.send_signal(signal.SIGSTOP)  # so that it answers no request before it dies
            n_open = n_open_files(workers)
            asked = [
                clients.submit(client.get, "/budget"),
                clients.submit(client.get, "/metrics"),
                clients.submit(client.put, "/budget", json={"fraction": 0.5}),
                clients.submit(client.post, "/classify", content=BODIES[0], headers=PNG),
            ]
            wait_until("all are connected", lambda: n_open_files(workers) >= n_open + len(asked))
            time.sleep(0.3)  # so that they are asking; if one is not yet, the test only checks less
            server.process.kill()
            server.process.wait()
            for response in asked:
                assert "the engine's process has ended" in problem(response.result(), 503, "not-ready")["detail"]
        wait_until("they end", lambda: not any(map(is_running, workers)))
    assert "Traceback" not in (tmp_path / "log").read_text()
