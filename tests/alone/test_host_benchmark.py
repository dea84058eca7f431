"""The benchmark of the engine's host cost, with one process per variant."""

import json
import os
import subprocess
import sys
from pathlib import Path

from service.compiled import compiled_sources
from tests.bundles import REPOSITORY


def test_it_measures_python_and_compiled_modules(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    less = ["--rounds", "1", "--n-images", "64", "--max-rows", "64", "--in-flight", "512"]
    command = [sys.executable, "-m", "benchmarks.host", *less, "--json", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = json.loads(path.read_text())
    assert list(found) == (["Python", "compiled"] if compiled_sources() else ["Python"])
    for [measured] in found.values():
        cores_busy = 1e-6 * measured["us_an_image"] * measured["images_per_s"]
        assert 0.02 < cores_busy < 2 * (os.cpu_count() or 1)  # medians over rounds, so not exactly bounded by the cores
        assert 0 < measured["alone_ms"] < measured["alone_whole_ms"]


def test_sources_are_loaded_even_if_compiled() -> None:
    code = "from benchmarks import host; host.load_sources(); from service.engine import core; print(core.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == REPOSITORY / "service/engine/core.py"
