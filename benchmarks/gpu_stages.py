"""Stage times in the GPU benchmark: every stage and bucket, with its roofline, and as compiled by others."""

import time
from collections.abc import Callable
from math import inf, prod
from typing import Any

import torch

from benchmarks.gpu_cases import Case, Plan
from service.runners.torch_cuda.compiling import COMPILERS, try_compiler
from service.runners.torch_cuda.lane import Lane
from service.runners.torch_cuda.runner import TorchCudaRunner


def program_seconds(lane: Lane, stage: int, bucket: int, plan: Plan) -> float:
    """Mean device time in seconds of one run of a program, over `plan.repeats` runs queued on the stream."""
    program = lane.programs[stage, bucket]
    with torch.inference_mode(), lane.stream.use():
        program()
        lane.stream.wait()
        if plan.device.kind.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(plan.repeats):
                program()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / plan.repeats
        started = time.perf_counter()
        for _ in range(plan.repeats):
            program()
        return (time.perf_counter() - started) / plan.repeats


def measure_peaks(plan: Plan) -> tuple[float, float]:
    """Measure multiply-adds/s in a large matrix product of random numbers, and bytes/s in a large copy."""
    side, n_bytes = (8192, 2**30) if plan.device.kind.type == "cuda" else (256, 2**20)
    a = torch.randn((side, side), device=plan.device.kind).to(plan.dtype)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=plan.device.kind)
    target = torch.empty_like(source)
    if plan.device.kind.type == "cuda":
        torch.cuda.synchronize()  # tensors were created on another stream

    def best_s(work: Callable[[], object]) -> float:
        stream, seconds = plan.device.open_stream(), []
        for _ in range(5):
            with stream.use():
                started = time.perf_counter()
                work()
                stream.wait()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return side**3 / best_s(lambda: a @ a), 2 * n_bytes / best_s(lambda: target.copy_(source))


def stage_bytes(runner: TorchCudaRunner, index: int) -> tuple[int, int]:
    """The least memory traffic of a stage in bytes: (per row, what it reads and writes; per batch, its weights)."""
    stage = runner.stages[index]
    carried = [name for name in (*stage.inputs, *stage.outputs) if name in runner.values]
    image_bytes = prod(runner.image_shape) if index == 0 else 0
    weight_bytes = sum(weight.nbytes for weight in stage.state_dict().values())
    return image_bytes + sum(map(runner.values.row_bytes, carried)), weight_bytes


def measure_stages(case: Case, runner: TorchCudaRunner, plan: Plan, peaks: tuple[float, float]) -> list[dict[str, Any]]:
    """For each stage and bucket: device time, roofline, and wall time of a call."""
    seen = runner.warm_up(inf)
    rows = []
    for stage, macs in enumerate(case.stage_macs):
        row_bytes, weight_bytes = stage_bytes(runner, stage)
        for bucket in runner.buckets:
            seconds = program_seconds(runner.lanes[0], stage, bucket, plan)
            roofline_s = max(macs * bucket / peaks[0], (weight_bytes + row_bytes * bucket) / peaks[1])
            rows.append(
                {
                    "stage": stage + 1,
                    "rows": bucket,
                    "device_ms": 1e3 * seconds,
                    "roofline_ms": 1e3 * roofline_s,
                    "share_of_roofline": roofline_s / seconds,
                    "call_ms": 1e3 * seen[stage][bucket],  # including copies, launch, wait and results
                }
            )
    return rows


def measure_compilers(runner: TorchCudaRunner, name: str, plan: Plan) -> list[dict[str, Any]]:
    """Compile every stage for full batches; returns the stages' times before and after, and the compilation times."""
    compiler = COMPILERS[name]
    lane, bucket = runner.lanes[0], runner.max_rows
    rows: list[dict[str, Any]] = []
    for stage in range(runner.n_stages):
        if rows and time.perf_counter() + 2 * rows[-1]["seconds_to_make"] > plan.until_s:
            break  # running out of time here would lose the results so far
        row: dict[str, Any] = {"stage": stage + 1, "plain_ms": 1e3 * program_seconds(lane, stage, bucket, plan)}
        plain, started = lane.programs[stage, bucket], time.perf_counter()
        try:
            call = try_compiler(runner, stage, compiler)
            row["ms"] = 1e3 * program_seconds(lane, stage, bucket, plan)
            del call  # not before: the program reads its weights
        except Exception as error:  # compilers raise many kinds
            if plan.device.is_lost():
                raise
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        lane.programs[stage, bucket] = plain
        row["seconds_to_make"] = time.perf_counter() - started
        rows.append(row)
    return rows
