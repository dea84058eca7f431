"""The overload benchmark offers multiples of a server's capacity and counts the CPU time of all its processes."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import overload
from benchmarks.load.connection import http_request
from benchmarks.load.result import Result
from benchmarks.null_bundle import write_null_bundle
from benchmarks.processes import REPOSITORY, served
from tests.bundles import random_images
from tests.service.apps import png

RATE_PER_S, SECONDS = 100.0, 1.0


@pytest.fixture
def null(tmp_path: Path) -> Path:
    write_null_bundle(tmp_path / "null")
    return tmp_path / "null"


def test_the_servers_cpu_time_includes_its_workers(null: Path) -> None:
    """Measured on a process whose child does all the work, as a server's workers do most of it."""
    busy = subprocess.Popen(["sh", "-c", "while :; do :; done & wait"], start_new_session=True)
    try:
        with served(["--bundle", str(null), "--lanes", "1"]) as (address, _):
            requests = [http_request(address + "/classify", png(random_images(1)[0]), "image/png")]
            run = overload.measure(address + "/classify", busy.pid, requests, 1.0, RATE_PER_S, SECONDS, seed=0)
    finally:
        os.killpg(busy.pid, signal.SIGKILL)
        busy.wait()
    assert run.other == 0
    assert run.answered_per_s > 0
    assert run.server_cpu_share > 0.1


def test_it_offers_multiples_of_the_capacity(null: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/one.png").write_bytes(png(random_images(1)[0]))
    options = ["--bundle", str(null), "--images", str(tmp_path / "images"), "--budget", "0.6", "--share-cores"]
    options += ["--seconds", "1", "--rounds", "1", "--json", str(tmp_path / "report.json")]
    command = [sys.executable, "-m", "benchmarks.overload", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["capacity_per_s"] > 0
    assert [row["times"] for row in report["rows"]] == list(overload.TIMES)
    assert max(row["share_of_peak"] for row in report["rows"]) == 1.0


def test_refusals_count_from_sending_and_answers_from_when_they_were_due() -> None:
    """Of six requests, two are answered, three refused, and one is neither; the client was 100 ms late with each."""
    sent_s = np.arange(6.0)
    result = Result(
        intended_s=sent_s - 0.1,
        sent_s=sent_s,
        done_s=sent_s + np.array([0.2, 0.001, 0.4, 0.002, 0.003, np.nan]),
        statuses=np.array([200, 429, 200, 429, 429, -1], np.int16),
        image_index=np.zeros(6, np.int64),
        bodies=[b""] * 6,
        seconds=10.0,
        client_cpu_s=5.0,
        stopped_early=False,
    )
    run = overload.run_of(1.5, result, server_cpu_s=20.0)
    assert (run.answered_per_s, run.refused_per_s, run.other) == (0.2, 0.3, 1)
    assert run.refusal_p50_ms == pytest.approx(2)
    assert run.refusal_p99_ms == pytest.approx(2.98)
    assert run.answer_p99_ms == pytest.approx(500)
    assert (run.server_cpu_share, run.client_cpu_share) == (2.0, 0.5)


def test_rates_are_medians_of_rounds_and_compared_with_the_best() -> None:
    rates = {1.0: (90.0, 100.0, 180.0), 2.0: (70.0, 80.0, 81.0)}
    runs = [overload.Run(times, rate, 1, 0, 2, 3, 4, 1.5, 0.5) for times, found in rates.items() for rate in found]
    told = overload.show(runs, 110.0, Console(file=io.StringIO()))
    assert told["capacity_per_s"] == 110.0
    assert [row["answered_per_s"] for row in told["rows"]] == [100.0, 80.0]
    assert [row["share_of_peak"] for row in told["rows"]] == [1.0, 0.8]
