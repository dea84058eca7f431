"""Compares the predictions of `python -m service plan` for this machine with the engine running on it.

    python -m benchmarks.plan_check --data cifar-100-python.tar.gz

Every round measures stage times, serves images (at saturation, then as Poisson streams of a half and four fifths of the
rate just reached), and measures stage times again. The prediction uses the mean of both tables, so that it refers to
the machine's speed in the same minute. There is no HTTP and no decoding. In a stream, the sending thread wakes for
every image; the CPU time that this takes beyond saturation is given to the planner in place of the cost of HTTP.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from threading import Event
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.closed_loop import STALLED_S, Load
from benchmarks.engine import Images, read_images
from benchmarks.options import JsonPath
from benchmarks.running import budget_of, run
from models.bundle import Bundle, load_bundle
from service.assembly import build_engine
from service.engine.engine import Engine
from service.engine.rows import Told
from service.errors import EngineError, EngineOverloaded
from service.plan.arrivals import poisson
from service.plan.measuring import measure
from service.plan.planning import Planner
from service.plan.simulation import Network, Setup
from service.plan.stage_times import StageTimes
from service.settled_memory import settle_memory

LOADS = (0.5, 0.8)  # shares of the rate at saturation
SETTLING_S = 1.0  # at the start of a stream, not counted


@dataclass(frozen=True)
class Pair:
    """One quantity in one round, predicted and measured."""

    what: str
    predicted: float
    live: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.live - 1


class Stream:
    """Submits images at given times, whether or not earlier ones are answered."""

    def __init__(self, engine: Engine, images: Images) -> None:
        self.latencies_s: list[tuple[float, float]] = []  # (when the image was due, its latency)
        self.n_refused = 0
        self.sender_s = 0.0  # CPU time of the sending thread, per image
        self._engine, self._images = engine, images
        self._n_images = 0
        self._done = Event()
        self._failed: EngineError | None = None

    def run(self, arrivals_s: Sequence[float]) -> tuple[float, float]:
        """Median and 99th percentile of the latency in ms, counted from when an image was due.

        Raises:
            EngineError: an image failed.
            TimeoutError: an answer is missing.
        """
        self._n_images = len(arrivals_s)
        started_s, sender_before_s = time.perf_counter(), time.thread_time()
        for after_s, image in zip(arrivals_s, cycle(self._images), strict=False):
            due_s = started_s + after_s
            if (ahead_s := due_s - time.perf_counter()) > 0:
                time.sleep(ahead_s)
            try:
                self._engine.submit_to(self._take, due_s, image)
            except EngineOverloaded:
                self.n_refused += 1
                self._note_end()
        self.sender_s = (time.thread_time() - sender_before_s) / len(arrivals_s)
        if not self._done.wait(STALLED_S):
            raise TimeoutError(f"{len(self.latencies_s) + self.n_refused} of {self._n_images} images were answered")
        if self._failed is not None:
            raise self._failed
        counted = [took_s for due_s, took_s in self.latencies_s if due_s >= started_s + SETTLING_S]
        p50, p99 = np.percentile(counted, [50, 99]).tolist()
        return 1e3 * p50, 1e3 * p99

    def _take(self, outcomes: list[tuple[Any, Told]]) -> None:
        now_s = time.perf_counter()
        for due_s, outcome in outcomes:
            if isinstance(outcome, EngineError):  # raised by `run`: raising it here would end the engine's thread
                self._failed = outcome
            self.latencies_s.append((due_s, now_s - due_s))
        self._note_end()

    def _note_end(self) -> None:
        # Each of the two counts has one writer: this thread or the engine's.
        if len(self.latencies_s) + self.n_refused == self._n_images:
            self._done.set()


def mean_of(tables: Sequence[StageTimes]) -> StageTimes:
    """The mean of tables that were measured on the same network, at the same batch sizes."""
    documents = [table.model_dump() for table in tables]
    mean = dict(documents[0])
    for name in (
        "alone_speed",
        "host_image_seconds",
        "host_batch_seconds",
        "wake_seconds",
        "spread",
        "copy_row_seconds",
    ):
        mean[name] = np.mean([document[name] for document in documents], axis=0).tolist()
    mean["stage_seconds"] = [
        {n_rows: float(np.mean([stage[n_rows] for stage in stages])) for n_rows in stages[0]}
        for stages in zip(*(document["stage_seconds"] for document in documents), strict=True)
    ]
    return StageTimes(**mean)


def check(
    bundle: Bundle, engine: Engine, images: Images, budget_mflops: float, seconds: float, seed: int
) -> tuple[list[Pair], int]:
    """Run one round; returns the pairs, and how many images the live engine refused."""
    n_lanes, max_rows = engine.n_lanes, engine.max_rows
    before = measure(bundle, n_lanes, max_rows, budget_mflops)
    sender_before_s = time.thread_time()
    reached = Load(engine, images, 4 * n_lanes * max_rows).run().images_per_s
    sender_s = (time.thread_time() - sender_before_s) / len(images)
    rates = [load * reached for load in LOADS]
    n_refused, live, extra_s = 0, [], []
    for rate in rates:
        stream = Stream(engine, images)
        n_images = round(rate * (seconds + SETTLING_S))
        live.append(stream.run(poisson(rate, n_images, seed).tolist()))
        extra_s.append(max(0.0, stream.sender_s - sender_s))  # for waking at every image
        n_refused += stream.n_refused
    times = mean_of([before, measure(bundle, n_lanes, max_rows, budget_mflops)])
    calibration = bundle.calibration
    network = Network(
        calibration.scores[bundle.manifest.score], calibration.correct, bundle.costs_mflops, bundle.frontier()
    )
    setup = Setup(budget_mflops, n_lanes, times.n_cores, max_rows)
    pairs = [Pair("images/s at saturation", Planner(network, times, setup, seed).saturated().images_per_s, reached)]
    for load, rate, image_s, (p50_ms, p99_ms) in zip(LOADS, rates, extra_s, live, strict=True):
        planner = Planner(network, times, replace(setup, http_image_s=image_s), seed)
        outcome = planner.at(rate, round(rate * seconds))
        pairs.append(Pair(f"p50 at {load:.0%} load, ms", outcome.p50_ms, p50_ms))
        pairs.append(Pair(f"p99 at {load:.0%} load, ms", outcome.p99_ms, p99_ms))
    return pairs, n_refused


def show(rounds: Sequence[Sequence[Pair]], title: str, console: Console) -> None:
    """Print medians over the rounds, and the errors of every round."""
    table = Table("", "predicted", "live", "error", "error by round", title=title)
    for pairs in zip(*rounds, strict=True):
        errors = [pair.error for pair in pairs]
        table.add_row(
            pairs[0].what,
            f"{median(pair.predicted for pair in pairs):,.1f}",
            f"{median(pair.live for pair in pairs):,.1f}",
            f"{median(errors):+.0%}",
            " ".join(f"{error:+.0%}" for error in errors),
        )
    console.print(table)


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")] = Path("models/zoo/cifar100-msdnet"),
    data: Annotated[
        Path | None, typer.Option(envvar="EXITSERVE_DATA", help="Image set, as for training; default: noise.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Budget, as a fraction of the full network's cost.")] = 0.4,
    images: Annotated[int, typer.Option(min=2, help="Images at saturation.")] = 4_000,
    seconds: Annotated[float, typer.Option(min=0.5, help="Seconds per stream, after one second of settling.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    lanes: Annotated[int | None, typer.Option(min=1, help="Concurrent batches; by default, one per core.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="The largest batch.")] = 32,
    int8: Annotated[bool, typer.Option(help="Use the bundle's int8 stages.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Compare the planner's predictions with the engine on this machine."""
    loaded = load_bundle(bundle).at("int8" if int8 else "fp32")
    description, pixels = read_images(data, loaded, images)
    budget_mflops = budget_of(loaded, fraction)
    engine = build_engine(loaded, budget_mflops, device="cpu", n_lanes=lanes, max_rows=max_rows)
    engine.start()
    try:
        Load(engine, pixels[: len(pixels) // 2], 4 * engine.n_lanes * max_rows).run()  # until steering settles
        settle_memory()  # as the server does
        results = [check(loaded, engine, pixels, budget_mflops, seconds, seed) for seed in range(rounds)]
    finally:
        engine.drain(60)
    found = [pairs for pairs, _ in results]
    title = (
        f"{loaded.manifest.name} in {loaded.precision}, {fraction:.0%} budget, {engine.n_lanes} lanes, {description}"
    )
    show(found, title, Console())
    if n_refused := sum(n for _, n in results):
        Console().print(f"{n_refused} images were refused live: the streams exceeded the capacity of this machine")
    if json_path is not None:
        json_path.write_text(json.dumps([[asdict(pair) for pair in pairs] for pairs in found], indent=2) + "\n")


if __name__ == "__main__":
    run(main)
