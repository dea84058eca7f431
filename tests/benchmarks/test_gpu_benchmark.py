"""Dry runs of the GPU benchmark on the CPU, with only the packages that it requires."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from benchmarks.closed_loop import Load, ideal_rate
from benchmarks.gpu import main, run_apart
from benchmarks.gpu_cases import NETWORKS, Case, Plan, check_answers, make_case, make_cifar, make_images
from benchmarks.gpu_engines import measure_engine
from benchmarks.gpu_onnx import measure_onnx
from benchmarks.gpu_page import write_up
from benchmarks.gpu_stages import measure_stages, stage_bytes
from models.bundle import load_bundle
from service.errors import EngineError
from service.runners.base import FatalRunnerError
from service.runners.torch_cuda.cuda_calls import CudaCalls
from service.runners.torch_cuda.device import Cuda, Host
from service.runners.torch_cuda.network import load_network
from service.runners.torch_cuda.runner import TorchCudaRunner
from tests.bundles import MEAN, REPOSITORY, STD, tiny_bundle

MISSING = ("onnxruntime", "fastapi", "starlette", "uvicorn", "orjson", "PIL", "typer", "rich", "prometheus_client")
MISSING += ("pydantic_settings", "onnx", "onnxscript", "onnx_ir")
COMPILING = "by torch.compile"


def test_a_dry_run_checks_and_measures_and_is_marked_as_such(tmp_path: Path) -> None:
    """With only torch, numpy, pydantic, safetensors and their dependencies importable."""
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no module named {name}')")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--skip", COMPILING]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert done.stdout == page
    assert page.startswith("# DRY RUN of the GPU benchmark: these numbers mean nothing\n")
    assert "NOT MET" not in page
    assert "Failed" not in page
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    (case,) = report["networks"]
    assert case["not_begun"] == {COMPILING: "as asked"}
    found = case["found"]
    assert found["answers"]["same_label_and_exit"] == 1.0
    assert [(row["stage"], row["rows"]) for row in found["stages"]] == [(s, b) for s in range(1, 5) for b in (1, 2, 4)]
    assert all(row["device_ms"] > 0 < row["roofline_ms"] and row["eager_ms"] > 0 for row in found["stages"])
    engines = {name: rows for name, rows in found.items() if name.startswith("engine")}
    budgets = {name: [row["budget"] for row in rows] for name, rows in engines.items()}
    assert budgets == {
        "engine: default": [0.25, 0.4, 0.6, 1.0],
        "engine without a network": [0.4],
        "engine: no compaction": [0.4],
        "engine: torch eager, staged": [0.4],
    }
    for rows in engines.values():
        assert all(sum(row["shares"]) == pytest.approx(1) and row["images_per_s"] > 0 for row in rows)
    default = engines["engine: default"]
    assert default[0]["cost"] < default[-1]["cost"]
    wholes = [found[f"whole network, {n_rows} rows"] for n_rows in (2, 4)]
    assert all(0 < whole["lowest_and_highest"][0] <= whole["images_per_s"] for whole in wholes)
    assert found["alone_ms"]["whole network, p50"] > 0
    assert all("cudnn_convolution_relu" in row["failed"] for row in found["by cuDNN"])  # which CPUs do not have
    assert found["onnx"] == {"onnx on cpu": {"skipped": "this network has no ONNX stages"}}
    assert "Not measured, onnx on cpu: this network has no ONNX stages" in page


def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: invalid argument\nand more")

    monkeypatch.setattr("benchmarks.gpu_parts.measure_alone", fails)
    run = ("answers", "engine: default", "alone_ms", "engine: no compaction", "onnx")
    told = tmp_path / "tiny.json"
    only = [word for part in run for word in ("--only", part)]
    assert main(["--device", "cpu", "--quick", "--part-of", str(told), *only]) == 0
    case = json.loads(told.read_text())
    assert case["failed"] == {"alone_ms": "RuntimeError: CUDA error: invalid argument\nand more"}
    assert case["found"].keys() == set(run) - {"alone_ms"}
    page = write_up({"dry": False, "seconds": 1.0, "networks": [case]})
    assert "* **Failed**, alone_ms: RuntimeError: CUDA error: invalid argument\n" in page
    assert "One image alone" not in page


def test_after_a_lost_device_no_part_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise FatalRunnerError("an illegal memory access was encountered")

    monkeypatch.setattr("benchmarks.gpu_parts.check_answers", lost)
    told = tmp_path / "tiny.json"
    assert main(["--device", "cpu", "--quick", "--part-of", str(told)]) == 0
    case = json.loads(told.read_text())
    assert case["failed"] == {"answers": "FatalRunnerError: an illegal memory access was encountered"}
    assert set(case["found"]) == {"peaks"}
    assert "the device was lost before" in write_up({"dry": False, "seconds": 1.0, "networks": [case]})


def test_only_runs_a_single_part(tmp_path: Path) -> None:
    told = tmp_path / "tiny.json"
    half = ["--dtype", "float16", "--only", "answers", "--only", "answer"]
    both = ["--network=cifar", "--network", "tiny"]  # the requested ones, then that of this process
    assert main(["--device", "cpu", "--quick", "--part-of", str(told), *half, *both]) == 0
    case = json.loads(told.read_text())
    assert case["network"] == "tiny"
    assert set(case["found"]) == {"answers"}
    assert case["failed"] == {"answer": "no part has this name"}
    assert case["dtype"] == "torch.float16"
    assert case["found"]["answers"]["worst_logit_error_of_largest"] < 5e-3
    assert " at 25%, " in write_up({"dry": False, "seconds": 1.0, "networks": [case]})


def test_a_process_that_hangs_is_killed_and_reported(tmp_path: Path) -> None:
    report = run_apart("tiny", -4.0, ["--device", "cpu", "--quick"], tmp_path)
    ((part, why),) = report["failed"].items()
    assert part.startswith("the whole, while ")
    assert "its process" in why
    assert "**Failed**, the whole" in write_up({"dry": False, "seconds": 1.0, "networks": [report]})


def test_given_images_leave_by_the_bundles_calibration(tmp_path: Path) -> None:
    images = make_images(6, 32)[::-1]
    np.savez(tmp_path / "test.npz", images=images)
    plan = Plan(Host(), torch.float32, **NETWORKS["tiny"].amounts, images=tmp_path / "test.npz")
    case = make_cifar(plan)
    assert np.array_equal(case.images, images)
    assert case.bundle is not None
    assert case.frontier.at(0.5).thresholds == case.bundle.frontier().at(0.5).thresholds
    assert case.kind == "images of test.npz, exits as calibrated"


@pytest.fixture(scope="module")
def tiny() -> tuple[Plan, Case, TorchCudaRunner]:
    plan = Plan(Host(), torch.float32, **NETWORKS["tiny"].amounts)
    case = NETWORKS["tiny"].make(plan)
    return plan, case, case.runner(plan)


def test_one_answer_that_differs_is_seen(tiny: tuple[Plan, Case, TorchCudaRunner]) -> None:
    _, case, runner = tiny
    n_images = len(case.images)
    logits = [np.concatenate([np.roll(of[:1], 1, axis=1), of[1:]]) for of in case.logits]
    told = check_answers(replace(case, logits=logits), runner)
    assert told["same_label_and_exit"] == (n_images - 1) / n_images
    assert not told["met"]
    assert told["same_at_other_budgets"] == {"25%": (n_images - 1) / n_images, "60%": (n_images - 1) / n_images}
    assert told["worst_logit_error_of_largest"] > 0.01
    assert check_answers(case, runner)["met"]


def test_a_roofline_is_that_of_compute_or_of_memory(tiny: tuple[Plan, Case, TorchCudaRunner]) -> None:
    """At one multiply-add per second and any number of bytes, and the other way round."""
    plan, case, runner = tiny
    for row in measure_stages(case, runner, plan, (1.0, inf)):
        assert row["roofline_ms"] == pytest.approx(1e3 * case.stage_macs[row["stage"] - 1] * row["rows"])
        assert row["share_of_roofline"] == pytest.approx(row["roofline_ms"] / row["device_ms"])
    for row in measure_stages(case, runner, plan, (inf, 1.0)):
        row_bytes, weight_bytes = stage_bytes(runner, row["stage"] - 1)
        assert row["roofline_ms"] == pytest.approx(1e3 * (weight_bytes + row["rows"] * row_bytes))
    first, last = runner.stages[0], runner.stages[-1]
    written = sum(runner.values.row_bytes(name) for name in first.outputs if name in runner.values)
    read = sum(map(runner.values.row_bytes, last.inputs))
    assert [stage_bytes(runner, stage)[0] for stage in (0, runner.n_stages - 1)] == [32 * 32 * 3 + written, read]


def test_the_share_of_the_ideal_and_of_idle_time_follow_from_device_times(
    tiny: tuple[Plan, Case, TorchCudaRunner],
) -> None:
    plan, case, runner = tiny
    for batch_s, idle in ((1e-9, pytest.approx(1.0, abs=1e-3)), (1e3, 0.0)):
        device_s = {(stage, rows): batch_s for stage in range(1, runner.n_stages + 1) for rows in runner.buckets}
        [told] = measure_engine(case, runner, "default", plan, device_s, (0.4,))
        ideal = ideal_rate([batch_s / runner.max_rows] * runner.n_stages, told["shares"], 1)
        assert told["ideal_images_per_s"] == pytest.approx(ideal)
        assert told["share_of_ideal"] == pytest.approx(told["images_per_s"] / ideal)
        assert told["device_idle"] == idle
        assert told["cost"] == pytest.approx(np.dot(told["shares"], case.costs_mflops) / case.costs_mflops[-1])


def test_an_image_that_is_not_answered_ends_the_load() -> None:
    class Failing:
        """An engine that answers nothing."""

        stage_seconds = ()

        def stats(self) -> Any:
            return SimpleNamespace(idle_mflops=0.0)

        def budget_state(self) -> Any:
            return SimpleNamespace(spent_answered_mflops=0.0)

        def submit_all(self, sink: Any, tokens: Any, images: Any, which: Any) -> None:
            sink([(token, EngineError("the device is lost")) for token in tokens])

        def flush(self) -> None:
            pass

    with pytest.raises(EngineError, match="the device is lost"):
        Load(Failing(), make_images(5, 4), 2).run()  # type: ignore[arg-type]


def test_onnx_runtime_is_checked_and_measured_if_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path / "tiny"))
    plan = Plan(Host(), torch.float32, **NETWORKS["tiny"].amounts)
    case = make_case("tiny", load_network(bundle), MEAN, STD, "logit_margin", make_images(32, 32), plan)
    case = replace(case, bundle=bundle)
    (told,) = measure_onnx(case, plan).values()
    assert told["answers"]["same_label_and_exit"] == 1.0
    assert [(row["stage"], row["rows"]) for row in told["stages"]] == [(s, b) for s in range(1, 5) for b in (1, 2, 4)]
    assert [row["budget"] for row in told["rates"]] == [0.25, 0.4, 0.6, 1.0]
    assert all(row["images_per_s"] > 0 for row in told["rates"])
    assert told["alone_ms"]["whole network, p50"] > 0
    late = replace(plan, until_s=0.0)
    assert measure_onnx(case, late) == {"onnx on cpu": {"skipped": "too little time is left"}}
    monkeypatch.setitem(sys.modules, "service.runners.onnx_device.runner", None)
    assert "pip install onnxruntime-gpu onnx" in measure_onnx(case, plan)["onnx on cpu"]["skipped"]


def test_an_unavailable_provider_is_skipped_with_its_reason(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path / "tiny"))
    calls = cast(CudaCalls, SimpleNamespace())  # not called
    plan = Plan(Cuda(calls=calls), torch.float32, **NETWORKS["tiny"].amounts, tensorrt=True)
    host = replace(plan, device=Host())
    case = make_case("tiny", load_network(bundle), MEAN, STD, "logit_margin", make_images(32, 32), host)
    told = measure_onnx(replace(case, bundle=bundle), plan)
    assert set(told) == {"onnx on cuda", "onnx on tensorrt"}
    assert all("was asked for, but" in one["skipped"] for one in told.values())


def test_without_a_gpu_the_error_names_the_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "sees no GPU; --device cpu --quick is a dry run without one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
