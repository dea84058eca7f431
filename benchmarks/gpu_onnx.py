"""ONNX Runtime in the GPU benchmark: the same checks and rates, if it is installed and the case has a bundle."""

import time
from math import inf
from typing import Any, Literal

from benchmarks.gpu_cases import Case, Plan, check_answers
from benchmarks.gpu_engines import measure_alone, measure_engine

ONNX_S = 60.0  # time that must be left to begin


def measure_onnx(case: Case, plan: Plan) -> dict[str, dict[str, Any]]:
    """Results by execution provider; `skipped` has the reason why one was not measured."""
    if plan.device.kind.type == "cpu":
        return {"onnx on cpu": _measure(case, plan, "cpu")}
    skipped = {"skipped": "its engines take minutes to build; --tensorrt includes it"}
    tensorrt = _measure(case, plan, "tensorrt") if plan.tensorrt else skipped
    return {"onnx on cuda": _measure(case, plan, "cuda"), "onnx on tensorrt": tensorrt}


def _measure(case: Case, plan: Plan, on: Literal["cpu", "cuda", "tensorrt"]) -> dict[str, Any]:
    if case.bundle is None:
        return {"skipped": "this network has no ONNX stages"}
    if time.perf_counter() + ONNX_S > plan.until_s:
        return {"skipped": "too little time is left"}
    try:
        from models.onnx_weights import StageLoadError
        from service.runners.base import RunnerError
        from service.runners.onnx_device.runner import OnnxDeviceRunner
    except ImportError as error:
        return {"skipped": f"{error}: pip install onnxruntime-gpu onnx"}
    try:
        runner = OnnxDeviceRunner(case.bundle, on, plan.max_rows, 2 * plan.in_flight)
        seen = runner.warm_up(inf)
    except (RunnerError, StageLoadError) as error:
        return {"skipped": str(error)}
    # Wall times of calls, since ONNX Runtime does not time its captured graphs.
    call_s = {(stage + 1, rows): s for stage, by_rows in enumerate(seen) for rows, s in by_rows.items()}
    return {
        "graphs": runner.cuda_graphs,
        "answers": check_answers(case, runner),
        "stages": [{"stage": stage, "rows": rows, "call_ms": 1e3 * s} for (stage, rows), s in call_s.items()],
        "rates": measure_engine(case, runner, "default", plan, call_s),
        "alone_ms": measure_alone(case, runner, plan),
    }
