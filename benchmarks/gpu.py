"""Checks and measures the GPU engine: `python -m benchmarks.gpu`, in under 8 minutes on a machine with a GPU.

It runs from the sources and needs torch, numpy, pydantic and safetensors. For each network, in a process of its own, it
compares the answers with those of the same network in float32, run eagerly, and then measures, the most important parts
first. The results of a part are written before the next begins. The report names parts that fail; the others still run.
Images (except those of `--images`), labels and the larger network's weights are SYNTHETIC. Exits are calibrated on the
same images, so that budgets are kept. Nothing here says anything about accuracy.

    --device cpu --quick    a dry run of the same code on the CPU, whose numbers mean nothing
    --network cifar         one network only
"""

import argparse
import faulthandler
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import NETWORKS
from benchmarks.gpu_page import write_up
from benchmarks.gpu_parts import measure_network, save

LIMIT_S = 470.0  # for everything: just below 8 minutes
SPARE_S = 15.0  # for starting a process, or killing one that hangs


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="a tiny network and very short runs, to try the script")
    parser.add_argument(
        "--network", choices=NETWORKS, action="append", help="network to measure (default: all but the tiny one)"
    )
    parser.add_argument(
        "--seconds", type=float, default=LIMIT_S, help="time limit for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="precision of feature maps (default: float16)"
    )
    parser.add_argument("--lanes", type=int, default=2, help="concurrent batches (default: %(default)s)")
    parser.add_argument(
        "--tensorrt", action="store_true", help="also measure TensorRT, whose engines take minutes to build"
    )
    parser.add_argument("--images", type=Path, help=".npz with `images` [n, 32, 32, 3] for the CIFAR-size network")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PART", help="skip this part, named as in the report; repeatable"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="run only this part and what it needs; repeatable"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-benchmark"), help="folder for gpu.md and gpu.json")
    parser.add_argument("--part-of", type=Path, help=argparse.SUPPRESS)  # measure here, write to this file
    given = parser.parse_args(arguments)
    given.network = given.network or (["tiny"] if given.quick else ["cifar", "imagenet"])
    return given


def run_apart(network: str, seconds: float, arguments: Sequence[str], out: Path) -> dict[str, Any]:
    """Measure a network in a child process, for at most `seconds`; returns its report, perhaps incomplete."""
    part = out / f"{network}.json"
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--seconds", f"{seconds:.0f}"]  # overrides
    try:
        done = subprocess.run([*command, "--network", network, "--part-of", str(part)], timeout=seconds + SPARE_S)
        ended = "" if done.returncode == 0 else f"its process ended with exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"its process was killed after {seconds + SPARE_S:.0f} s"
    report: dict[str, Any] = {"network": network, "failed": {}}
    if part.exists():
        report = json.loads(part.read_text())
    if ended:
        report["failed"][f"the whole, while {report.get('at', 'it started')}"] = ended
    return report


def main(arguments: Sequence[str]) -> int:
    """Check, measure and write the report; returns the exit code, 1 if a part failed or answers differ too much."""
    given = parse(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        why = f"torch {torch.__version__} sees no GPU"
        sys.stderr.write(f"error: {why}; --device cpu --quick is a dry run without one\n")
        return 2
    if given.part_of is not None:
        faulthandler.dump_traceback_later(given.seconds + 5, exit=True)  # shows where a hanging process is
        try:
            measure_network(given)
        finally:
            faulthandler.cancel_dump_traceback_later()
        return 0
    started = time.perf_counter()
    given.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"dry": given.device == "cpu" or given.quick, "networks": []}
    for i, network in enumerate(given.network):
        left_s = given.seconds - (time.perf_counter() - started)
        share_s = left_s / (len(given.network) - i) - SPARE_S
        report["networks"].append(run_apart(network, share_s, arguments, given.out))
        report["seconds"] = time.perf_counter() - started
        page = write_up(report)
        save(given.out / "gpu.json", report)
        (given.out / "gpu.md").write_text(page)
    sys.stdout.write(page)
    met = [case.get("found", {}).get("answers", {}).get("met", False) for case in report["networks"]]
    return 0 if all(met) and not any(case["failed"] for case in report["networks"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
