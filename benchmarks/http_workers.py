"""The gain from `--http-workers`: requests/s and CPU time per request, with a network that computes nothing.

    python -m benchmarks.http_workers

Servers with no, one, two, ... workers take turns under the same load, so that changes in the machine's speed affect all
alike. The load comes from wrk (Debian's package `wrk`), which takes a few microseconds per request. It still shares the
cores with the servers, so the table gives the CPU time of both besides requests/s. On a machine with enough cores,
separate them:

    python -m benchmarks.http_workers --server-cores 0,1 --client-cores 2,3 --client-threads 2

The engine's CPU time per request limits the throughput with any number of workers.
"""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.null_bundle import write_null_bundle
from benchmarks.options import JsonPath, whole_numbers
from benchmarks.processes import children, cpu_s, on_cores, served


@dataclass(frozen=True)
class Round:
    """Results of one server in one round. CPU times are per request, summed over cores."""

    requests_per_s: float
    http_us: float  # in the processes that handle HTTP; without workers, the whole server
    engine_us: float  # in the engine's process, if there are workers
    client_us: float
    refused: int  # answers other than 200, and socket errors
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Client:
    """The load: wrk's script, its connections (one request each) and threads, and its cores (None: any)."""

    script: Path
    connections: int
    threads: int
    cores: Set[int] | None

    def run(self, url: str, seconds: int) -> str:
        """Send requests for `seconds`; returns wrk's output."""
        command = ["wrk", f"--threads={self.threads}", f"--connections={self.connections}", f"--duration={seconds}s"]
        command += ["--latency", "--timeout=10s", f"--script={self.script}", url]
        with on_cores(self.cores):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Measured:
    """A running server and its results."""

    def __init__(self, n_workers: int, pid: int, url: str) -> None:
        self.n_workers, self.pid, self.url = n_workers, pid, url
        self.rounds: list[Round] = []

    def run(self, client: Client, seconds: int) -> Round:
        workers = children(self.pid)
        before = [cpu_s(pid) for pid in (self.pid, *workers)]
        client_before = resource.getrusage(resource.RUSAGE_CHILDREN)
        output = client.run(self.url + "/classify", seconds)
        spent = [cpu_s(pid) - b for pid, b in zip((self.pid, *workers), before, strict=True)]
        client_after = resource.getrusage(resource.RUSAGE_CHILDREN)
        client_s = sum(client_after[:2]) - sum(client_before[:2])
        n_requests = int(match_in(r"(\d+) requests in", output))
        if not n_requests:
            raise SystemExit(f"no request was answered:\n{output}")
        errors = sum(
            int(n) for n in re.findall(r"(?:connect|read|write|timeout|Non-2xx or 3xx responses:) (\d+)", output)
        )
        return Round(
            requests_per_s=float(match_in(r"Requests/sec:\s+([\d.]+)", output)),
            http_us=1e6 * (sum(spent[1:]) if workers else spent[0]) / n_requests,
            engine_us=1e6 * spent[0] / n_requests if workers else 0.0,
            client_us=1e6 * client_s / n_requests,
            refused=errors,
            p50_ms=milliseconds(match_in(r"(?m)^\s+50%\s+(\S+)", output)),
            p99_ms=milliseconds(match_in(r"(?m)^\s+99%\s+(\S+)", output)),
        )


def match_in(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"wrk's output is not as expected, without {pattern!r}:\n{text}")
    return match[1]


def milliseconds(text: str) -> float:
    """Parse a latency of wrk's, such as `850.00us`, `12.30ms` or `1.02s`."""
    number, unit = match_in(r"^([\d.]+)", text), match_in(r"([a-z]+)$", text)
    return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}[unit]


def load_script(folder: Path, size_px: int) -> Path:
    """Write the script that makes wrk send one PNG of the network's size; returns its path."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((size_px, size_px)).save(file, "PNG")
    body = "".join(f"\\{byte:03d}" for byte in file.getvalue())
    script = folder / "load.lua"
    script.write_text(
        f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "image/png"\nwrk.body = "{body}"\n', encoding="ascii"
    )
    return script


def show(servers: list[Measured], console: Console, title: str) -> None:
    table = Table(
        "HTTP workers", "requests/s", "x none", "HTTP us", "engine us", "client us", "p50, p99 ms", title=title
    )
    alone = servers[0].rounds
    for measured in servers:
        rounds = measured.rounds
        rates = [r.requests_per_s for r in rounds]
        gain = median(r.requests_per_s / a.requests_per_s for r, a in zip(rounds, alone, strict=True))
        table.add_row(
            str(measured.n_workers),
            f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})",
            f"{gain:.2f}",
            f"{median(r.http_us for r in rounds):.0f}",
            f"{median(r.engine_us for r in rounds):.0f}" if measured.n_workers else "",
            f"{median(r.client_us for r in rounds):.0f}",
            f"{median(r.p50_ms for r in rounds):.1f}, {median(r.p99_ms for r in rounds):.1f}",
        )
    console.print(table)
    engine_us = median(r.engine_us for measured in servers if measured.n_workers for r in measured.rounds)
    console.print(f"On a core of its own, the engine's process would allow {1e6 / engine_us:.0f} requests/s.")
    if refused := sum(r.refused for measured in servers for r in measured.rounds):
        console.print(f"{refused} requests were not answered with 200.")


def cores_of(text: str | None) -> Set[int] | None:
    """Parse a comma-separated list of cores; typer.BadParameter unless this process may use all of them."""
    if text is None:
        return None
    usable = os.sched_getaffinity(0)
    try:
        cores = {int(number) for number in text.split(",")}
    except ValueError:
        raise typer.BadParameter(f"{text!r}: give numbers of cores, as in 0,1") from None
    if not cores <= usable:
        raise typer.BadParameter(f"{text}: this process may use the cores {', '.join(map(str, sorted(usable)))}")
    return cores


def main(
    workers: Annotated[str, typer.Option(help="Numbers of workers to compare with none, comma-separated.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per server.")] = 5,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds per round.")] = 5,
    connections: Annotated[int, typer.Option(min=1, help="Concurrent connections, with one request each.")] = 64,
    size_px: Annotated[
        int, typer.Option(min=1, help="Height and width of the images and of the network's input.")
    ] = 32,
    server_cores: Annotated[
        str | None, typer.Option(help="Cores for all processes of each server; by default, any.")
    ] = None,
    client_cores: Annotated[str | None, typer.Option(help="Cores for the client; by default, any.")] = None,
    client_threads: Annotated[int, typer.Option(min=1, help="Threads of the client.")] = 1,
    json_path: JsonPath = None,
) -> None:
    """Compare servers with HTTP worker processes with one without."""
    if shutil.which("wrk") is None:
        raise SystemExit("error: the load client wrk is missing: apt-get install wrk")
    n_with = whole_numbers(workers, "1,2")
    for_server, for_client = cores_of(server_cores), cores_of(client_cores)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_null_bundle(folder / "null", size_px)
        client = Client(load_script(folder, size_px), connections, client_threads, for_client)
        options = ["--bundle", str(folder / "null"), "--device", "cpu", "--lanes", "1", "--log-level", "error"]
        servers = []
        for n_workers in (0, *n_with):
            url, pid = stack.enter_context(served([*options, "--http-workers", str(n_workers)], for_server))
            servers.append(Measured(n_workers, pid, url))
        for measured in servers:
            measured.run(client, 1)
        for _ in range(rounds):
            for measured in servers:
                measured.rounds.append(measured.run(client, seconds))
    title = f"A network that computes nothing, {size_px} px PNG, {connections} connections, {os.cpu_count()} cores"
    title += "".join(
        f", {len(cores)} of them for the {who}"
        for who, cores in (("server", for_server), ("client", for_client))
        if cores
    )
    show(servers, Console(), title)
    if json_path is not None:
        report = {str(measured.n_workers): [asdict(r) for r in measured.rounds] for measured in servers}
        json_path.write_text(json.dumps({"title": title, "rounds": report}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
