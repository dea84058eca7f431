"""The GPU benchmark, dry: the same code on the processor, without what a fresh clone on a GPU machine may lack."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main
from benchmarks.gpu_cases import Plan, make_case, make_images
from benchmarks.gpu_onnx import measure_onnx
from models.bundle import load_bundle
from service.runners.torch_cuda.device import Cuda, Host
from service.runners.torch_cuda.network import load_network
from tests.bundles import MEAN, REPOSITORY, STD, tiny_bundle

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
    assert found["onnx"] == {"onnx on cpu": {"skipped": "this network has no ONNX stages"}}
    assert "Not measured, onnx on cpu: this network has no ONNX stages" in page


def test_onnx_runtime_is_checked_and_measured_where_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path / "tiny"))
    plan = Plan(Host(), torch.float32, 4, 32, 16, 0.05, 2, 4)
    case = make_case("tiny", load_network(bundle), MEAN, STD, "logit_margin", make_images(32, 32), plan)
    case = replace(case, bundle=bundle)
    (told,) = measure_onnx(case, plan).values()
    assert told["answers"]["same_label_and_exit"] == 1.0
    assert [(row["stage"], row["rows"]) for row in told["stages"]] == [(s, b) for s in range(1, 5) for b in (1, 2, 4)]
    assert [row["budget"] for row in told["rates"]] == [0.25, 0.4, 0.6, 1.0]
    assert all(row["images_per_s"] > 0 for row in told["rates"])
    assert told["alone_ms"]["whole network, p50"] > 0
    late = replace(plan, onnx_until_s=0.0)
    assert measure_onnx(case, late) == {"onnx on cpu": {"skipped": "too little time is left"}}
    monkeypatch.setitem(sys.modules, "service.runners.onnx_device.runner", None)
    assert "pip install onnxruntime-gpu onnx" in measure_onnx(case, plan)["onnx on cpu"]["skipped"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_provider_that_is_not_there_is_left_out_with_its_reason(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path / "tiny"))
    plan = Plan(Cuda(), torch.float32, 4, 32, 16, 0.05, 2, 4, True)
    host = replace(plan, device=Host())
    case = make_case("tiny", load_network(bundle), MEAN, STD, "logit_margin", make_images(32, 32), host)
    told = measure_onnx(replace(case, bundle=bundle), plan)
    assert set(told) == {"onnx on cuda", "onnx on tensorrt"}
    assert all("was asked for, but" in one["skipped"] for one in told.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_how_to_try_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "sees no GPU; --device cpu --quick is a dry run without one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
