"""The GPU engine, checked and measured: `python -m benchmarks.gpu`, in under 8 minutes on a machine with a GPU.

It needs torch, numpy, pydantic and safetensors, and no installation. First it compares answers with the same network in
float32, run eagerly; then it measures. Images, labels and the larger network's weights are SYNTHETIC: exits are
calibrated on these very images, so that budgets are kept, and nothing here says anything about accuracy.

    --device cpu --quick    a dry run of the same code on the processor, whose numbers mean nothing
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_cases import WANTED_SAME, Case, Plan, check_answers, make_cases
from benchmarks.gpu_engines import measure_alone, measure_engine
from benchmarks.gpu_onnx import measure_onnx
from benchmarks.gpu_page import write_up
from service.runners.torch_cuda.device import Cuda, Device, Host
from service.runners.torch_cuda.lane import Lane
from service.runners.torch_cuda.runner import TorchCudaRunner

ONNX_UNTIL_S = 240.0  # of 480 that all may take: what comes first is what is asked for


def program_seconds(lane: Lane, stage: int, bucket: int, plan: Plan) -> float:
    """What one run of a program takes on the device, several being put on the stream one after the other."""
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
    """Multiply-adds/s of a large matrix product, and bytes/s of a large copy, as found on this device."""
    side, n_bytes = (8192, 2**30) if plan.device.kind.type == "cuda" else (256, 2**20)
    a = torch.ones((side, side), dtype=plan.dtype, device=plan.device.kind)
    source = torch.empty(n_bytes, dtype=torch.uint8, device=plan.device.kind)
    target = torch.empty_like(source)

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
    """What a stage cannot help but move: of every row what it reads and writes, and once its weights."""
    stage = runner.stages[index]
    carried = [name for name in (*stage.inputs, *stage.outputs) if name in runner.values]
    image_bytes = prod(runner.image_shape) if index == 0 else 0
    weight_bytes = sum(weight.nbytes for weight in stage.state_dict().values())
    return image_bytes + sum(map(runner.values.row_bytes, carried)), weight_bytes


def measure_stages(
    case: Case, runner: TorchCudaRunner, eager: TorchCudaRunner, plan: Plan, peaks: tuple[float, float]
) -> list[dict[str, Any]]:
    """Each stage and bucket: on the device, beside its roofline; kernel by kernel; and as the caller sees it."""
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
                    "eager_ms": 1e3 * program_seconds(eager.lanes[0], stage, bucket, plan),
                    "call_ms": 1e3 * seen[stage][bucket],  # copies, launch, wait and gathering of verdicts included
                }
            )
    return rows


class LastExit(nn.Module):
    """A network without its exits: as one stage, it is one graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        logits: list[Tensor] = self.network(images)
        return logits[-1:]


def measure_whole(case: Case, plan: Plan) -> float:
    """Images/s of the whole network as one graph, exits off, full batches, no engine: the bar to beat."""
    runner = case.runner(plan, LastExit(case.network))
    rows = [runner.first_state(image) for image in case.images[: runner.max_rows]]

    def keep_running(_: int) -> int:
        n_batches = 0
        while time.perf_counter() < until_s:
            runner.run(0, rows)
            n_batches += 1
        return n_batches

    with ThreadPoolExecutor(runner.n_lanes) as lanes:
        started = time.perf_counter()
        until_s = started + plan.seconds
        n_batches = sum(lanes.map(keep_running, range(runner.n_lanes)))
        return n_batches * len(rows) / (time.perf_counter() - started)


def measure_case(case: Case, plan: Plan, peaks: tuple[float, float]) -> dict[str, Any]:
    runner = case.runner(plan)
    answers = check_answers(case, runner)
    eager_device = Cuda(graphs=False) if plan.device.kind.type == "cuda" else plan.device
    eager = case.runner(plan, device=eager_device, n_lanes=1)
    stages = measure_stages(case, runner, eager, plan, peaks)
    device_s = {(row["stage"], row["rows"]): row["device_ms"] / 1e3 for row in stages}
    return {
        "network": case.name,
        "full_mflops": case.costs_mflops[-1],
        "images": len(case.images),
        "answers": answers,
        "stages": stages,
        "whole_network_images_per_s": measure_whole(case, plan),
        "engines": {
            "torch eager, staged": measure_engine(case, eager, "none", plan, device_s),
            "graphs, no compaction": measure_engine(case, runner, "no-compaction", plan, device_s),
            "default": measure_engine(case, runner, "default", plan, device_s),
        },
        "alone_ms": measure_alone(case, runner, plan),
        "onnx": measure_onnx(case, plan),
    }


def main(arguments: Sequence[str]) -> int:
    """Check, measure, print and write; returns the exit code: 1 where answers differ more than they may."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="a tiny network and next to no time: to try the script")
    parser.add_argument(
        "--tensorrt", action="store_true", help="measure TensorRT too, whose engines take minutes to build"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-benchmark"), help="folder for gpu.md and gpu.json")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        why = f"torch {torch.__version__} sees no GPU"
        sys.stderr.write(f"error: {why}; --device cpu --quick is a dry run without one\n")
        return 2
    started = time.perf_counter()
    on_gpu = given.device == "cuda"
    device: Device = Cuda() if on_gpu else Host()
    dtype = torch.float16 if on_gpu else torch.float32
    amounts: tuple[Any, ...] = (4, 32, 16, 0.05, 2, 4) if given.quick else (64, 2048, 512, 4.0, 20, 200)
    plan = replace(Plan(device, dtype, *amounts), tensorrt=given.tensorrt, onnx_until_s=started + ONNX_UNTIL_S)
    peaks = measure_peaks(plan)
    real = on_gpu and not given.quick
    report: dict[str, Any] = {
        "title": "The GPU engine" if real else "DRY RUN of the GPU benchmark: these numbers mean nothing",
        "device": torch.cuda.get_device_name() if on_gpu else "the processor, without graphs or streams",
        "torch": torch.__version__,
        "dtype": str(dtype),
        "gmacs_per_s": peaks[0] / 1e9,
        "gbytes_per_s": peaks[1] / 1e9,
        "networks": [measure_case(case, plan, peaks) for case in make_cases(plan, given.quick)],
    }
    report["seconds"] = time.perf_counter() - started
    page = write_up(report)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.md").write_text(page)
    (given.out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(page)
    return 0 if all(case["answers"]["same_label_and_exit"] >= WANTED_SAME for case in report["networks"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
