"""The parts of the GPU benchmark for one network; the results of each are written before the next begins."""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.gpu_cases import NETWORKS, Case, Plan, check_answers
from benchmarks.gpu_engines import measure_alone, measure_engine, measure_idle, measure_whole
from benchmarks.gpu_onnx import measure_onnx
from benchmarks.gpu_page import AS_TORCH
from benchmarks.gpu_stages import measure_compilers, measure_peaks, measure_stages, program_seconds
from service import compiled
from service.runners.base import FatalRunnerError
from service.runners.torch_cuda.compiling import COMPILERS
from service.runners.torch_cuda.device import Cuda, Host
from service.runners.torch_cuda.kernels import Ways
from service.runners.torch_cuda.runner import TorchCudaRunner

T = TypeVar("T")
OPTIONAL_S = 60.0  # time that must be left to begin an optional part that may take long
Report = dict[str, Any]


def save(path: Path, report: Report) -> None:
    """Write atomically, as the process may be killed at any moment."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(path)


class Parts:
    """Runs parts and records their results in `report` and in a file.

    Args:
        skip: names of parts not to run.
        only: names of the parts to run, besides those that prepare others; empty: all.

    Attributes:
        goes_on: False once the device is lost.
    """

    def __init__(
        self, report: Report, path: Path, device: Cuda | Host, skip: Sequence[str], only: Sequence[str] = ()
    ) -> None:
        self.report, self.goes_on = report, True
        self._path, self._device, self._skip, self._only = path, device, skip, only

    def make(self, name: str, part: Callable[[], T]) -> T | None:
        """Run a part that prepares something for later ones; the report has only its time."""
        return self.run(name, part, reported=False)

    def run(self, name: str, part: Callable[[], T], reported: bool = True) -> T | None:
        """Run a part and record its result under its name, or why it failed; returns the result, None if none."""
        if reported and self._only and name not in self._only:
            return None
        if name in self._skip or not self.goes_on:
            self.report["not_begun"][name] = "as asked" if name in self._skip else "the device was lost before"
            return None
        self.report["at"] = name
        save(self._path, self.report)
        started = time.perf_counter()
        found: T | None = None
        try:
            found = part()
            if reported:
                self.report["found"][name] = found
        except Exception as error:  # other parts must still run
            sys.stderr.write(traceback.format_exc())
            self.report["failed"][name] = f"{type(error).__name__}: {error}"
            self.goes_on = not (isinstance(error, FatalRunnerError) or self._device.is_lost())
        self.report["part_seconds"][name] = time.perf_counter() - started
        sys.stderr.write(f"{self.report['network']}: {name}, {time.perf_counter() - started:.1f} s\n")
        save(self._path, self.report)
        return found


def clocks() -> str:
    """The GPU's name, driver, current clocks, temperature and power, from nvidia-smi."""
    fields = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed ({error})"


def measure_network(given: argparse.Namespace) -> None:
    """Check and measure one network, and write the report to `given.part_of`."""
    until_s = time.perf_counter() + given.seconds
    on_gpu = given.device == "cuda"
    device: Cuda | Host = Cuda(search_s=given.seconds / 6) if on_gpu else Host()
    dtype = getattr(torch, given.dtype or ("float16" if on_gpu else "float32"))
    network = NETWORKS[given.network[-1]]
    plan = Plan(device, dtype, **network.amounts, n_lanes=given.lanes, tensorrt=given.tensorrt, until_s=until_s)
    plan = replace(plan, images=given.images)
    report: Report = {
        "network": given.network[-1],
        "torch": f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}",
        "device": clocks() if on_gpu else "the CPU, without graphs or streams",
        "dtype": str(dtype),
        "lanes": given.lanes,
        "engine": compiled.state(),
        "found": {},
        "failed": {},
        "not_begun": {},
        "part_seconds": {},
    }
    parts = Parts(report, given.part_of, device, given.skip, given.only)
    peaks = parts.run("peaks", lambda: measure_peaks(plan)) or (inf, inf)
    case: Case | None = parts.make("the network", lambda: network.make(plan))
    if case is not None:
        report |= {
            "name": case.name,
            "full_mflops": case.costs_mflops[-1],
            "images": len(case.images),
            "kind": case.kind,
        }
        measure_case(case, plan, peaks, parts)
    for name in set(given.only).difference(report["found"], report["failed"], report["not_begun"]):
        report["failed"][name] = "no part has this name"
    report["device_at_end"] = clocks() if on_gpu else ""
    report["at"] = "it had ended"
    save(given.part_of, report)


def measure_case(case: Case, plan: Plan, peaks: tuple[float, float], parts: Parts) -> None:
    runner: TorchCudaRunner | None = parts.make("warm-up", lambda: case.runner(plan))
    if runner is None:
        return
    parts.report["max_rows"] = runner.max_rows
    on_gpu = plan.device.kind.type == "cuda"
    if on_gpu:
        parts.report["gib"] = torch.cuda.memory_reserved() / 2**30
    parts.run("answers", lambda: check_answers(case, runner))
    stages = parts.run("stages", lambda: measure_stages(case, runner, plan, peaks)) or []
    device_s = {(row["stage"], row["rows"]): row["device_ms"] / 1e3 for row in stages}

    def eager() -> list[dict[str, Any]]:
        device = Cuda(graphs=False) if on_gpu else plan.device
        other = case.runner(plan, device=device, n_lanes=1)
        for row in stages:
            row["eager_ms"] = 1e3 * program_seconds(other.lanes[0], row["stage"] - 1, row["rows"], plan)
        return measure_engine(case, other, "none", plan, device_s, (0.4,))

    for n_rows in plan.whole_rows:
        parts.run(f"whole network, {n_rows} rows", partial(measure_whole, case, plan, n_rows))
    parts.run(AS_TORCH, lambda: measure_whole(case, plan, plan.max_rows, Ways.none()))
    parts.run("engine: default", lambda: measure_engine(case, runner, "default", plan, device_s))
    parts.run("alone_ms", lambda: measure_alone(case, runner, plan))
    parts.run("engine without a network", lambda: measure_idle(case, plan))
    parts.run("engine: no compaction", lambda: measure_engine(case, runner, "no-compaction", plan, device_s, (0.4,)))
    parts.run("engine: torch eager, staged", eager)
    for name in COMPILERS:
        if plan.until_s - time.perf_counter() > OPTIONAL_S:
            parts.run(f"by {name}", partial(measure_compilers, runner, name, plan))
        else:
            parts.report["not_begun"][f"by {name}"] = "too little time is left"
    parts.run("onnx", lambda: measure_onnx(case, plan))
