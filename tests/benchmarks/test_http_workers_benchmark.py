"""The benchmark of HTTP workers: its network computes nothing, and every request is answered."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console

from benchmarks import http_workers
from benchmarks.http_workers import Measured, Round, cores_of, milliseconds
from benchmarks.null_bundle import write_null_bundle
from benchmarks.options import whole_numbers
from benchmarks.processes import on_cores
from service.assembly import build_engine
from tests.service.process import REPOSITORY


def test_every_image_leaves_the_null_network_at_once(tmp_path: Path) -> None:
    bundle = write_null_bundle(tmp_path / "null", size_px=16)
    engine = build_engine(bundle, bundle.costs_mflops[-1], n_lanes=1)
    engine.start()
    try:
        images = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), np.uint8)
        answers = [future.result(10) for future in [engine.submit(image) for image in images]]
    finally:
        engine.drain(10)
    assert {answer.exit for answer in answers} == {1}
    assert [answer.class_id for answer in answers] == [int(image.reshape(-1)[:10].argmax()) for image in images]


@pytest.mark.parametrize(("told", "ms"), [("850.50us", 0.8505), ("12.30ms", 12.3), ("1.02s", 1020.0), ("2.00m", 120e3)])
def test_wrks_latencies_are_parsed(told: str, ms: float) -> None:
    assert milliseconds(told) == pytest.approx(ms)


WRK = """Running 5s test @ http://127.0.0.1:1/classify
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    12.30ms    2.00ms  99.00ms   90.00%
    Req/Sec     1.00k    10.00     1.10k    90.00%
  Latency Distribution
     50%  850.00us
     75%   11.00ms
     90%   14.00ms
     99%   1.02s
  2000 requests in 5.00s, 1.00MB read
  Socket errors: connect 0, read 3, write 0, timeout 4
  Non-2xx or 3xx responses: 5
Requests/sec:    400.50
Transfer/sec:      0.20MB
"""


@pytest.mark.parametrize("n_workers", [0, 2])
def test_cpu_time_is_that_of_the_workers_or_of_the_only_process(
    n_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process spends 0.2 s and each worker a second, for 2,000 requests; workers have run for some time."""
    spent_s = {1: 0.2, 11: 1.0, 12: 1.0}
    now_s = dict(zip(spent_s, (5.0, 7.0, 8.0), strict=True))

    class Wrk:
        def run(self, url: str, seconds: int) -> str:
            assert (url, seconds) == ("http://there/classify", 5)
            for pid, s in spent_s.items():
                now_s[pid] += s
            return WRK

    monkeypatch.setattr(http_workers, "children", lambda pid: [11, 12][:n_workers])
    monkeypatch.setattr(http_workers, "cpu_s", lambda pid: now_s[pid])
    found = Measured(n_workers, 1, "http://there").run(Wrk(), 5)  # type: ignore[arg-type]
    assert found.requests_per_s == 400.5
    assert found.http_us == pytest.approx(1000 if n_workers else 100)
    assert found.engine_us == pytest.approx(100 if n_workers else 0)
    assert found.refused == 12
    assert (found.p50_ms, found.p99_ms) == pytest.approx((0.85, 1020))


def test_gains_are_compared_within_rounds() -> None:
    servers = [Measured(n_workers, 1, "") for n_workers in (0, 2)]
    for measured, rates in zip(servers, ((100.0, 50.0, 100.0), (300.0, 120.0, 200.0)), strict=True):
        measured.rounds = [Round(rate, 500.0, 125.0, 10.0, 0, 1.0, 2.0) for rate in rates]
    http_workers.show(servers, Console(file=(told := io.StringIO()), width=140), "")
    assert re.search(r"2 +│ 200 \(120 to 300\) +│ 2\.40 ", told.getvalue())  # of 3, 2.4 and 2; the medians' ratio is 2
    assert "would allow 8000 requests/s" in told.getvalue()


def test_processes_and_their_children_are_pinned_only_inside_the_context() -> None:
    usable = os.sched_getaffinity(0)
    core = max(usable)
    show = "import os; print(os.sched_getaffinity(0))"
    command = [sys.executable, "-c", f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {show!r}])"]
    with on_cores({core}):
        alone = subprocess.check_output(command, text=True)
    with on_cores(None):
        anywhere = subprocess.check_output(command, text=True)
    assert (alone.strip(), anywhere.strip()) == (str({core}), str(usable))
    assert os.sched_getaffinity(0) == usable


def test_cores_that_may_not_be_used_are_refused() -> None:
    core = min(os.sched_getaffinity(0))
    assert cores_of(None) is None
    assert cores_of(str(core)) == {core}
    for text in ("1000000", f"{core},1000000", "", "two", f"{core}-{core + 1}"):
        with pytest.raises(typer.BadParameter, match="cores"):
            cores_of(text)


def test_numbers_of_workers_are_whole() -> None:
    assert whole_numbers("1,2", "1,2") == [1, 2]
    for text in ("1.5", "0", "two", ""):
        with pytest.raises(typer.BadParameter, match="as in 1,2"):
            whole_numbers(text, "1,2")


def test_the_command_measures_servers_with_and_without_workers(tmp_path: Path) -> None:
    if shutil.which("wrk") is None:
        pytest.skip("the load client wrk is not installed")
    path = tmp_path / "report.json"
    options = ["--workers", "1", "--rounds", "1", "--seconds", "1", "--connections", "8", "--json", str(path)]
    cores = sorted(os.sched_getaffinity(0))
    options += ["--server-cores", str(cores[0]), "--client-cores", str(cores[-1]), "--client-threads", "2"]
    command = [sys.executable, "-m", "benchmarks.http_workers", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rounds = json.loads(path.read_text())["rounds"]
    for n_workers in ("0", "1"):
        [measured] = rounds[n_workers]
        assert measured["requests_per_s"] > 0
        assert measured["http_us"] > 0
        assert measured["refused"] == 0
    assert rounds["1"][0]["engine_us"] > 0 == rounds["0"][0]["engine_us"]
