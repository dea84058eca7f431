"""Several engines on one device, one per process: a dry run of the benchmark on the CPU."""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_processes
from benchmarks.gpu_processes import ROUNDS, main, measure
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


def test_the_total_rate_ends_with_the_last_engine_and_costs_are_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine answers 100 images in a second and another 200 in two, after a round that adapts them."""

    def told(images: int, seconds: float, cost: float) -> StringIO:
        lines = [{"what": "a network"}, {"images": 1, "seconds": 50.0, "cost": 1.0}]
        lines += [{"images": images, "seconds": seconds, "cost": cost}] * ROUNDS
        return StringIO("".join(json.dumps(line) + "\n" for line in lines))

    outputs = iter([told(100, 1.0, 0.3), told(200, 2.0, 0.6)])

    def start(command: list[str], **options: object) -> SimpleNamespace:
        nothing = dict.fromkeys(("wait", "kill"), lambda: 0)
        return SimpleNamespace(stdin=StringIO(), stdout=next(outputs), **nothing)

    monkeypatch.setattr(gpu_processes.subprocess, "Popen", start)
    found = measure(2, [], 1.0)
    assert found["images_per_s"] == 150
    assert found["lowest_and_highest"] == [150, 150]
    assert found["cost"] == pytest.approx(0.5)


def test_without_a_gpu_it_fails_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "sees no GPU; --device cpu --quick is a dry run without one" in capsys.readouterr().err
