"""Throughput under overload, at rates up to 3 times the capacity: `python -m benchmarks.overload --help`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.load.arrivals import poisson
from benchmarks.load.connection import http_request
from benchmarks.load.loops import closed_loop, open_loop
from benchmarks.load.result import Result
from benchmarks.options import JsonPath
from benchmarks.processes import REPOSITORY, SAMPLES, cpu_with_children_s, served

TIMES = (0.9, 1.0, 1.5, 2.0, 3.0)  # offered rates, as multiples of the capacity
N_IN_FLIGHT = 64  # in the closed loop that measures the capacity


@dataclass(frozen=True)
class Run:
    """Results at one rate."""

    times: float  # offered rate, as a multiple of the capacity
    answered_per_s: float
    refused_per_s: float
    other: int  # neither answered nor refused with 429
    refusal_p50_ms: float
    refusal_p99_ms: float
    answer_p99_ms: float
    server_cpu_share: float  # of one core
    client_cpu_share: float  # likewise; on shared cores, it is missing to the server


def run_of(times: float, result: Result, server_cpu_s: float) -> Run:
    refused = result.statuses == 429
    # From sending, not from when it was due: the client's own delay says nothing about refusals.
    waits_ms = (result.done_s - result.sent_s)[refused] * 1e3 if refused.any() else np.array([np.nan])
    return Run(
        times=times,
        answered_per_s=result.achieved_rate,
        refused_per_s=int(refused.sum()) / result.seconds,
        other=int((~refused & ~result.answered).sum()),
        refusal_p50_ms=float(np.percentile(waits_ms, 50)),
        refusal_p99_ms=float(np.percentile(waits_ms, 99)),
        answer_p99_ms=result.percentile_ms(99, of_all=False),
        server_cpu_share=server_cpu_s / result.seconds,
        client_cpu_share=result.client_cpu_s / result.seconds,
    )


def measure(url: str, pid: int, requests: list[bytes], times: float, rate: float, seconds: float, seed: int) -> Run:
    before_s = cpu_with_children_s(pid)
    result = uvloop.run(open_loop(url, requests, poisson(rate, seconds, seed), max_connections=4096))
    return run_of(times, result, cpu_with_children_s(pid) - before_s)


def show(runs: Sequence[Run], capacity: float, console: Console) -> dict[str, Any]:
    """Print one row per rate, medians over the rounds; returns them in JSON types."""
    rows = []
    for times in sorted({run.times for run in runs}):
        same = [run for run in runs if run.times == times]
        rows.append({name: median(getattr(run, name) for run in same) for name in Run.__dataclass_fields__})
    peak = max(row["answered_per_s"] for row in rows)
    table = Table(title=f"offered rates as multiples of {capacity:.0f} images/s, the closed-loop capacity")
    names = "offered|answered/s|of the peak|refused/s|refusal p50, p99 ms|answer p99 ms|server CPU|client CPU"
    for name in names.split("|"):
        table.add_column(name, justify="right")
    table.add_column("other")
    for row in rows:
        row["share_of_peak"] = row["answered_per_s"] / peak
        table.add_row(
            f"{row['times']:g} x",
            f"{row['answered_per_s']:.0f}",
            f"{row['share_of_peak']:.1%}",
            f"{row['refused_per_s']:.0f}",
            f"{row['refusal_p50_ms']:.1f}, {row['refusal_p99_ms']:.1f}",
            f"{row['answer_p99_ms']:.0f}",
            f"{row['server_cpu_share']:.2f}",
            f"{row['client_cpu_share']:.2f}",
            f"{row['other']:.0f}",
        )
    console.print(table)
    return {"capacity_per_s": capacity, "rows": rows}


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle to serve.")] = REPOSITORY / "models" / "zoo" / "cifar100-msdnet",
    images: Annotated[Path, typer.Option(help="Folder of PNG files, sent in turn.")] = SAMPLES,
    budget: Annotated[float, typer.Option(help="Budget, as a fraction of the full cost.")] = 0.4,
    seconds: Annotated[float, typer.Option(min=1.0, help="Seconds per rate and round.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each measures every rate once.")] = 3,
    http_workers: Annotated[int, typer.Option(min=0, help="The server's --http-workers.")] = 0,
    share_cores: Annotated[bool, typer.Option(help="Let client and server share all cores.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Load a server at 0.9, 1, 1.5, 2 and 3 times its capacity, at times fixed beforehand (open loop).

    The client runs on the last core and the server on the others, unless --share-cores is given: otherwise a client
    that sends three times as much would take CPU time from the server that it measures.
    """
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = (set(cores), set(cores)) if share_cores or len(cores) < 2 else ({cores[-1]}, set(cores[:-1]))
    bodies = [path.read_bytes() for path in sorted(images.glob("*.png"))]
    if not bodies:
        raise typer.BadParameter(f"{images} holds no PNG", param_hint="--images")
    arguments = ["--bundle", str(bundle), "--budget-fraction", str(budget)]
    arguments += ["--http-workers", str(http_workers)]
    with served(arguments, theirs) as (address, pid):
        os.sched_setaffinity(0, ours)
        url = address + "/classify"
        requests = [http_request(url, body, "image/png") for body in bodies]
        uvloop.run(closed_loop(url, requests, N_IN_FLIGHT, min(seconds, 3.0)))  # until the server knows its pace
        capacity = uvloop.run(closed_loop(url, requests, N_IN_FLIGHT, seconds)).achieved_rate
        turns = [(times, number) for number in range(rounds) for times in TIMES]
        runs = [measure(url, pid, requests, times, times * capacity, seconds, number) for times, number in turns]
    summary = show(runs, capacity, Console())
    if json_path is not None:
        json_path.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
