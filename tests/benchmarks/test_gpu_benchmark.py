"""The GPU benchmark, dry: the same code on the processor, without what a fresh clone on a GPU machine may lack."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main
from tests.bundles import REPOSITORY

# The command, where nothing can be imported but torch, numpy, pydantic, safetensors and what these need themselves.
PROGRAM = """
import runpy, sys
for name in ("onnxruntime", "fastapi", "starlette", "uvicorn", "orjson", "PIL", "typer", "rich", "prometheus_client",
             "pydantic_settings", "onnx", "onnxscript", "onnx_ir"):
    sys.modules[name] = None
sys.argv[0] = "gpu"
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_it_checks_measures_and_writes_and_says_that_it_is_a_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, "--device", "cpu", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert done.stdout == page
    assert page.startswith("# DRY RUN of the GPU benchmark: these numbers mean nothing\n")
    assert "NOT MET" not in page
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    (found,) = report["networks"]
    assert found["answers"]["same_label_and_exit"] == 1.0
    assert [(row["stage"], row["rows"]) for row in found["stages"]] == [(s, b) for s in range(1, 5) for b in (1, 2, 4)]
    assert all(row["device_ms"] > 0 < row["roofline_ms"] for row in found["stages"])
    assert list(found["engines"]) == ["torch eager, staged", "graphs, no compaction", "default"]
    for rows in found["engines"].values():
        assert [row["budget"] for row in rows] == [0.25, 0.4, 0.6, 1.0]
        assert all(sum(row["shares"]) == pytest.approx(1) and row["images_per_s"] > 0 for row in rows)
        assert rows[0]["cost"] < rows[-1]["cost"]
    assert found["whole_network_images_per_s"] > 0
    assert found["alone_ms"]["whole network, p50"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_how_to_try_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "sees no GPU; --device cpu --quick is a dry run without one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
