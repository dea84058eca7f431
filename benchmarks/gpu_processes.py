"""Throughput of several engines on one GPU, one per process: `python -m benchmarks.gpu_processes`.

A process has one interpreter. If Python is the bottleneck, one engine leaves the GPU partly idle, and more engines use
more of it. Each keeps its own budget, so together they keep it on average. The processes warm up one after another,
then all serve at the same time. Requirements are those of `benchmarks.gpu`.

    --device cpu --quick    a dry run on the CPU, whose numbers mean nothing
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.closed_loop import Load
from benchmarks.gpu_cases import NETWORKS, Plan
from benchmarks.gpu_engines import ROUNDS
from benchmarks.processes import REPOSITORY
from service import compiled
from service.runners.torch_cuda.device import Cuda, Host
from service.settled_memory import settle_memory

FRACTION = 0.4  # the budget, of the full network's cost
ROUND_S = 3.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_processes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="a tiny network and very short runs, to try the script")
    parser.add_argument("--network", choices=NETWORKS, help="network to measure (default: cifar)")
    parser.add_argument(
        "--processes", default="1,2,4", help="numbers of processes, measured in turn (default: %(default)s)"
    )
    parser.add_argument("--images", type=Path, help=".npz with `images` [n, 32, 32, 3] for the CIFAR-size network")
    parser.add_argument("--json", type=Path, help="also write all results to this JSON file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # serve in this process
    given = parser.parse_args(arguments)
    given.network = given.network or ("tiny" if given.quick else "cifar")
    return given


def answer_as_told(given: argparse.Namespace) -> None:
    """Run one engine: print a line once warm; for every line of stdin, a number of seconds, serve for about as long and
    print the result."""
    on_gpu = given.device == "cuda"
    network = NETWORKS[given.network]
    device: Cuda | Host = Cuda() if on_gpu else Host()
    dtype = torch.float16 if on_gpu else torch.float32
    plan = Plan(device, dtype, **network.amounts, images=given.images)
    case = network.make(plan)
    engine = case.engine(case.runner(plan), "default", plan)
    engine.start()
    try:
        engine.set_budget(FRACTION * case.costs_mflops[-1])
        settle_memory(plan.in_flight)
        rate = Load(engine, case.images, plan.in_flight).run().images_per_s
        print(json.dumps({"what": f"{case.name}, {case.kind}"}), flush=True)
        for line in sys.stdin:
            n_images, started = max(len(case.images), int(rate * float(line))), time.perf_counter()
            found = Load(engine, case.images, plan.in_flight, n_images).run()
            took_s, rate = time.perf_counter() - started, found.images_per_s
            cost = found.mean_mflops / case.costs_mflops[-1]
            print(json.dumps({"images": n_images, "seconds": took_s, "cost": cost}), flush=True)
    finally:
        engine.drain(10)


def measure(n_processes: int, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Total images/s of `n_processes` engines, and their mean cost per image as a share of the full network's."""
    command = [sys.executable, "-m", "benchmarks.gpu_processes", "--one", *arguments]
    rates, costs = [], []
    with ExitStack() as ends:
        processes = []
        for _ in range(n_processes):
            process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            ends.callback(process.wait)
            ends.callback(process.kill)
            processes.append(process)
            what = json.loads(_line(process))["what"]
        for n_round in range(ROUNDS + 1):
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{seconds}\n")
                process.stdin.flush()
            results = [json.loads(_line(process)) for process in processes]
            n_images = sum(result["images"] for result in results)
            if n_round:  # the first only adapts their rates to running together
                rates.append(n_images / max(result["seconds"] for result in results))
                costs.append(sum(result["images"] * result["cost"] for result in results) / n_images)
    spread = [min(rates), max(rates)]
    return {
        "what": what,
        "processes": n_processes,
        "images_per_s": median(rates),
        "lowest_and_highest": spread,
        "cost": median(costs),
    }


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"error: an engine's process ended with exit code {process.wait()}; its last output is above")
    return line


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            f"error: torch {torch.__version__} sees no GPU; --device cpu --quick is a dry run without one\n"
        )
        return 2
    if given.one:
        answer_as_told(given)
        return 0
    own = ["--device", given.device, "--network", given.network]
    own += ["--images", str(given.images.absolute())] if given.images else []
    dry = given.device == "cpu" or given.quick
    print(f"{'DRY RUN, these numbers mean nothing. ' if dry else ''}At {FRACTION:.0%} budget; {compiled.state()}.")
    found: list[dict[str, Any]] = []
    for n_processes in map(int, given.processes.split(",")):
        found.append(measure(n_processes, own, 0.1 if given.quick else ROUND_S))
        one, first = found[-1], found[0]
        low, high = one["lowest_and_highest"]
        print(
            f"{one['what']}: {n_processes} processes, {one['images_per_s']:,.0f} images/s ({low:,.0f} to {high:,.0f}), "
            f"{one['images_per_s'] / first['images_per_s']:.2f} times {first['processes']}; cost {one['cost']:.1%}",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
