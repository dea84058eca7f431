"""Several engines on one device, one per process: a dry run of the benchmark on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_processes import main
from tests.data import REPOSITORY


def test_parallel_engines_answer_and_keep_their_budget(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_processes", "--device", "cpu", "--quick", "--processes", "2"]
    command += ["--json", str(tmp_path / "told.json")]
    told = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads((tmp_path / "told.json").read_text())
    [both] = found
    assert both["processes"] == 2
    low, high = both["lowest_and_highest"]
    assert 0 < low <= both["images_per_s"] <= high
    assert 0.3 < both["cost"] < 0.5
    assert "SYNTHETIC" in both["what"]
    assert told.startswith("DRY RUN, these numbers mean nothing. At 40% budget; the engine runs ")
    assert len(told.splitlines()) == 2


def test_without_a_gpu_it_fails_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "sees no GPU; --device cpu --quick is a dry run without one" in capsys.readouterr().err
