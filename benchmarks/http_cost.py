"""The cost of HTTP and decoding: the service with a network that computes nothing and always answers at exit 1.

    python -m benchmarks.http_cost

Everything else is the service's own: uvicorn, routes, decoding, metrics, the engine with its scheduler and budget. The
results are the CPU time per request of the whole process, that of the engine without HTTP, and their difference; and
for how long decoding blocks the event loop, measured by ticks on the loop itself.
"""

import asyncio
import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
import uvloop
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.league.pictures import read_pictures
from benchmarks.load.arrivals import poisson
from benchmarks.load.connection import http_request
from benchmarks.load.loops import closed_loop, open_loop
from benchmarks.options import JsonPath
from benchmarks.processes import cpu_s
from benchmarks.running import run
from models.bundle import Bundle, load_bundle
from service.api.app import create_app
from service.assembly import default_burst_images
from service.budget.controller import BudgetController
from service.budget.target import Keeper, Targets
from service.command_line import load_settings
from service.engine.engine import Engine
from service.engine.observer import Observer
from service.engine.rows import Told
from service.engine.scheduler import Scheduler
from service.metrics import Metrics
from service.runners.base import StageOutput
from service.runners.blocks import Block, RowState
from service.server import Server, listen
from service.settled_memory import settle_memory

ZOO = Path("models/zoo")
MAX_ROWS = 32
TICK_S = 0.001
IN_FLIGHT = 32
BUDGET_FRACTION = 0.4


class NullRunner:
    """A network that computes nothing and always answers class 0, confidently; see `service.runners.base.Runner`."""

    def __init__(self, bundle: Bundle) -> None:
        self.n_stages, self.n_lanes, self.max_rows = len(bundle.manifest.stages), 1, MAX_ROWS
        self._logits = np.zeros((MAX_ROWS, len(bundle.manifest.class_names)), np.float32)
        self._logits[:, 0] = 50.0

    def first_state(self, image: NDArray[np.uint8]) -> RowState:
        return RowState(Block({"images": image[None]}, 1), 0)

    def run(self, stage: int, rows: Sequence[RowState]) -> StageOutput:
        return StageOutput(self._logits[: len(rows)], Block({}, len(rows)), 1e-6)

    def warm_up(self, limit_s: float = 1.0) -> list[dict[int, float]]:
        return [{1: 1e-6, self.max_rows: 1e-6}] * self.n_stages


def null_engine(bundle: Bundle, observer: Observer | None = None) -> Engine:
    """The engine as the service builds it, with a null network."""
    runner, costs_mflops = NullRunner(bundle), bundle.costs_mflops
    burst_images = default_burst_images(runner.n_lanes, MAX_ROWS)
    return Engine(
        runner,
        BudgetController(bundle.frontier(), costs_mflops, BUDGET_FRACTION * costs_mflops[-1], burst_images, True),
        Scheduler(runner.n_stages, MAX_ROWS, 0.05),
        bundle.score(),
        bundle.manifest.class_names,
        observer=observer,
    )


class Ticks:
    """A timer on the event loop: measures gaps between its ticks, and the CPU time of the loop's thread in them."""

    def __init__(self) -> None:
        self.longest_gap_s = self.longest_work_s = 0.0
        self._running = False
        self._last = (0.0, 0.0)

    def start(self) -> None:
        """Start ticking. To be called on the loop's thread, whose CPU time is read."""
        self.longest_gap_s = self.longest_work_s = 0.0
        self._running, self._last = True, (time.perf_counter(), time.thread_time())
        asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def stop(self) -> tuple[float, float]:
        """Stop, since ticks cost CPU time; returns the longest gap and the most CPU time in one, in s. Thread-safe."""
        self._running = False
        return self.longest_gap_s, self.longest_work_s

    def _tick(self) -> None:
        now = (time.perf_counter(), time.thread_time())
        self.longest_gap_s = max(self.longest_gap_s, now[0] - self._last[0] - TICK_S)
        self.longest_work_s = max(self.longest_work_s, now[1] - self._last[1])
        self._last = now
        if self._running:
            asyncio.get_running_loop().call_later(TICK_S, self._tick)


def serve(bundle_path: Path, listener: socket.socket, parent: "Connection[Any, Any]") -> None:
    """Serve a null network until `parent` is closed; "start" and "stop" received on it control the ticks."""
    bundle = load_bundle(bundle_path)
    metrics, targets = Metrics(bundle.manifest), Targets(bundle.frontier(), bundle.costs_mflops)
    settings = load_settings(["--bundle", str(bundle_path), "--access-log", "off"])
    ticks = Ticks()
    loops: list[asyncio.AbstractEventLoop] = []

    def on_started(error: Exception | None) -> None:
        loops.append(asyncio.get_running_loop())
        settle_memory()
        parent.send(None if error is None else str(error))

    engine = null_engine(bundle, metrics)
    metrics.watch(engine.stats, engine.budget_state, bundle)
    keeper = Keeper(engine, targets.resolve("fraction", BUDGET_FRACTION))
    app = create_app(bundle, engine, metrics, targets, keeper, settings, None, on_started)
    server = Server(app, settings)

    def listen_to_parent() -> None:
        while True:
            try:
                word = parent.recv()
            except (EOFError, OSError):
                server.should_exit = True
                return
            if word == "start":
                loops[0].call_soon_threadsafe(ticks.start)
                parent.send((0.0, 0.0))
            else:
                parent.send(ticks.stop())

    threading.Thread(target=listen_to_parent, daemon=True).start()
    server.run(sockets=[listener])


class NullServer:
    """Runs `serve` in a child process."""

    def __init__(self, bundle_path: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/classify"
        self._child, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(bundle_path, listener, theirs))
        self.process.start()
        theirs.close()
        listener.close()
        if (error := self._child.recv()) is not None:
            raise RuntimeError(error)

    def ask(self, word: str) -> tuple[float, float]:
        """Send "start" or "stop"; the latter returns the longest gap and the most CPU time in one, in seconds."""
        self._child.send(word)
        gap_s, work_s = self._child.recv()
        return gap_s, work_s

    def cpu_s(self) -> float:
        assert self.process.pid is not None
        return cpu_s(self.process.pid)

    def stop(self) -> None:
        self._child.close()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()


@dataclass(frozen=True)
class Cost:
    """Results for one bundle's images with a null network; single numbers are medians over rounds."""

    images: str
    requests_per_s: float  # in a closed loop
    process_us: float  # CPU time per request of the whole server process
    engine_us: float  # of the engine alone, with images submitted in this process
    http_us: list[float]  # the difference: HTTP and decoding, by round
    longest_gap_ms: list[float]  # of the event loop at half that rate, by round
    longest_work_ms: list[float]  # the most CPU time of the loop's thread in one gap, by round


def engine_us(bundle: Bundle, n_images: int) -> float:
    """CPU time per image of the engine alone, with a null network and 32 images in flight."""
    engine = null_engine(bundle)
    engine.start()
    size = bundle.manifest.input
    image = np.zeros((size.height_px, size.width_px, 3), np.uint8)
    room, done = threading.Semaphore(IN_FLIGHT), threading.Semaphore(0)

    def take(outcomes: list[tuple[Any, Told]]) -> None:
        room.release(len(outcomes))
        done.release(len(outcomes))

    try:
        before_s = time.process_time()
        for _ in range(n_images):
            room.acquire()
            engine.submit_to(take, None, image)
        for _ in range(n_images):
            done.acquire()
        return 1e6 * (time.process_time() - before_s) / n_images
    finally:
        engine.drain(10)


def measure(bundle_path: Path, data: Sequence[Path], seconds: float, rounds: int) -> Cost:
    """Measure one bundle: the server, the engine alone and the event loop's gaps, in turns."""
    bundle = load_bundle(bundle_path)
    pictures = read_pictures(bundle, data, 500)
    server = NullServer(bundle_path)
    requests = [http_request(server.url, file, pictures.content_type) for file in pictures.files]
    rates, process, engine, gaps, work = [], [], [], [], []
    try:
        uvloop.run(closed_loop(server.url, requests, IN_FLIGHT, min(1.0, seconds)))
        for _ in range(rounds):
            before_s = server.cpu_s()
            result = uvloop.run(closed_loop(server.url, requests, IN_FLIGHT, seconds))
            process.append(1e6 * (server.cpu_s() - before_s) / max(1, int(result.answered.sum())))
            rates.append(result.achieved_rate)
            engine.append(engine_us(bundle, max(200, int(seconds * 4000))))
            server.ask("start")
            uvloop.run(open_loop(server.url, requests, poisson(0.5 * result.achieved_rate, seconds)))
            gap_s, work_s = server.ask("stop")
            gaps.append(1e3 * gap_s)
            work.append(1e3 * work_s)
    finally:
        server.stop()
    http = [whole - part for whole, part in zip(process, engine, strict=True)]
    return Cost(pictures.description, median(rates), median(process), median(engine), http, gaps, work)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def show(costs: Sequence[Cost], console: Console) -> None:
    table = Table("", *(cost.images for cost in costs), title="the service with a null network; medians of rounds")
    table.add_row("requests/s, closed loop, client beside it", *(f"{cost.requests_per_s:.0f}" for cost in costs))
    table.add_row("CPU of the server process, us per request", *(f"{cost.process_us:.0f}" for cost in costs))
    table.add_row("CPU of the engine alone, us per image", *(f"{cost.engine_us:.0f}" for cost in costs))
    table.add_row("HTTP and decoding (the difference), us", *(_spread(cost.http_us) for cost in costs))
    table.add_row("event loop's longest gap at half load, ms", *(_spread(cost.longest_gap_ms) for cost in costs))
    table.add_row("most CPU time of the loop's thread in a gap, ms", *(_spread(cost.longest_work_ms) for cost in costs))
    console.print(table)


def main(
    bundle: Annotated[list[Path] | None, typer.Option(help="Bundle; repeatable. By default, those that ship.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Image set; repeatable. By default, the sample images that ship, scaled.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds per run.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    json_path: JsonPath = None,
) -> None:
    """Measure the CPU time of HTTP and decoding per request, and how long the event loop is blocked."""
    bundles = bundle or [ZOO / "cifar100-msdnet", ZOO / "imagenette-msdnet"]
    costs = [measure(path, data or [], seconds, rounds) for path in bundles]
    show(costs, Console())
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")


if __name__ == "__main__":
    run(main)
