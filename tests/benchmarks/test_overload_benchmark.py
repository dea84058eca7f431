"""The overload benchmark offers multiples of a server's capacity and counts the CPU time of all its processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import overload
from benchmarks.load.connection import http_request
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
