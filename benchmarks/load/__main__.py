"""`python -m benchmarks.load URL --rate 500 --seconds 20 --images FOLDER`: see `main`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.load.arrivals import bursts, poisson
from benchmarks.load.connection import http_request
from benchmarks.load.loops import open_loop
from benchmarks.load.result import Result
from benchmarks.options import JsonPath
from benchmarks.processes import SAMPLES

CONTENT_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
}


def read_requests(url: str, folder: Path) -> list[bytes]:
    """One request for every image file in a folder and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in CONTENT_TYPES)
    if not files:
        raise typer.BadParameter(f"{folder} holds no image ({', '.join(CONTENT_TYPES)})", param_hint="--images")
    return [http_request(url, path.read_bytes(), CONTENT_TYPES[path.suffix.lower()]) for path in files]


def show(result: Result, rate: float, console: Console) -> dict[str, Any]:
    """Print the summary as a table; returns the summary."""
    summary = result.summary(rate)
    table = Table("", "", title="open loop: latency counts from when a request was due to be sent")
    table.add_row("offered, requests/s", f"{rate:.1f}")
    table.add_row("answered with 200, requests/s", f"{summary['achieved_per_s']:.1f}")
    table.add_row("sent / answered with 200", f"{summary['sent']} / {summary['answered']}")
    for name, count in summary["failures"].items():
        table.add_row(f"failed: {name}", str(count))
    for p in (50, 95, 99):
        table.add_row(f"latency of answers, p{p}, ms", f"{summary[f'p{p}_ms']:.2f}")
    table.add_row("latency of answers, longest, ms", f"{summary['max_ms']:.2f}")
    table.add_row("client's delay in sending (part of the latencies), p99, ms", f"{summary['late_sending_p99_ms']:.2f}")
    share, each_us = summary["client_cpu_share"], summary["client_cpu_us_per_request"]
    table.add_row("the client's own CPU", f"{share:.1%} of a core, {each_us:.0f} us per request")
    console.print(table)
    return summary


def main(
    url: Annotated[str, typer.Argument(help="Address to POST images to, e.g. http://127.0.0.1:8000/classify.")],
    rate: Annotated[float, typer.Option(min=0.01, help="Requests per second, on average.")] = 100.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to send.")] = 10.0,
    images: Annotated[Path, typer.Option(help="Folder of image files, sent in turn as raw bodies.")] = SAMPLES,
    burst: Annotated[int, typer.Option(min=1, help="Requests sent at once; 1: independent (Poisson) arrivals.")] = 1,
    connections: Annotated[int, typer.Option(min=1, help="Most concurrent connections.")] = 1024,
    drain: Annotated[float, typer.Option(help="Seconds to wait for the last answers.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of the arrival times.")] = 0,
    json_path: JsonPath = None,
) -> None:
    """Send images to a server at times fixed beforehand, and report how long its answers took.

    No coordinated omission: requests are sent when due, however slow the server is, and latency counts from when they
    were due. The table lists every kind of failure.
    """
    requests = read_requests(url, images)
    arrivals = bursts(rate, seconds, burst, seed) if burst > 1 else poisson(rate, seconds, seed)
    try:
        result = uvloop.run(open_loop(url, requests, arrivals, max_connections=connections, drain_s=drain))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {url} cannot be reached ({error}); start the server first, or correct the address")
    summary = show(result, rate, Console())
    if json_path is not None:
        json_path.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
