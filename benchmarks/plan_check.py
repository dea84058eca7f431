"""What `python -m service plan` predicts for this machine, compared with what the engine then does on it.

    python -m benchmarks.plan_check --data cifar-100-python.tar.gz

Every round measures stage times, serves real images (at saturation, then at half and at four fifths of the rate just
reached, as a Poisson stream), and measures stage times again; the prediction is made from the mean of the two tables.
So both see the machine of the same minute. In process: no HTTP, no decoding. What the thread that sends takes more
than it does at saturation, since it wakes for every image, is told to the planner as HTTP's cost would be.
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

from benchmarks.closed_loop import Load
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

LOADS = (0.5, 0.8)  # of the rate reached at saturation
SETTLING_S = 1.0  # of a stream, not counted


@dataclass(frozen=True)
class Pair:
    """One quantity, predicted and seen, in one round."""

    what: str
    predicted: float
    live: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was seen."""
        return self.predicted / self.live - 1


class Stream:
    """Images submitted at given times, whatever becomes of those before."""

    def __init__(self, engine: Engine, images: Images) -> None:
        self.latencies_s: list[tuple[float, float]] = []  # (when it was due, how long it then took)
        self.n_refused = 0
        self.sender_s = 0.0  # processor time of the thread that sends, an image
        self._engine, self._images = engine, images
        self._n_left = 0
        self._done = Event()
        self._failed: EngineError | None = None

    def run(self, arrivals_s: Sequence[float]) -> tuple[float, float]:
        """Median and 99th percentile of the latency in ms, counted from the moment an image was due.

        Raises:
            EngineError: an image was not answered.
        """
        self._n_left = len(arrivals_s)
        started_s, sender_before_s = time.perf_counter(), time.thread_time()
        for after_s, image in zip(arrivals_s, cycle(self._images), strict=False):
            due_s = started_s + after_s
            if (ahead_s := due_s - time.perf_counter()) > 0:
                time.sleep(ahead_s)
            try:
                self._engine.submit_to(self._take, due_s, image)
            except EngineOverloaded:
                self.n_refused += 1
                self._end(1)
        self.sender_s = (time.thread_time() - sender_before_s) / len(arrivals_s)
        self._done.wait()
        if self._failed is not None:
            raise self._failed
        counted = [took_s for due_s, took_s in self.latencies_s if due_s >= started_s + SETTLING_S]
        p50, p99 = np.percentile(counted, [50, 99]).tolist()
        return 1e3 * p50, 1e3 * p99

    def _take(self, told: list[tuple[Any, Told]]) -> None:
        now_s = time.perf_counter()
        for due_s, outcome in told:
            if isinstance(outcome, EngineError):  # to be raised by who sends: on the engine's thread it would end that
                self._failed = outcome
            self.latencies_s.append((due_s, now_s - due_s))
        self._end(len(told))

    def _end(self, n_images: int) -> None:
        self._n_left -= n_images
        if not self._n_left:
            self._done.set()


def mean_of(tables: Sequence[StageTimes]) -> StageTimes:
    """The mean of tables of the same network, measured at the same batch sizes."""
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
    """One round; returns the pairs, and how many images the live engine refused."""
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
        extra_s.append(max(0.0, stream.sender_s - sender_s))  # it sleeps and wakes for every image
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
    """Print medians over the rounds, and of the errors all of them."""
    table = Table("", "predicted", "live", "error", "of each round", title=title)
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
        Path | None, typer.Option(envvar="EXITSERVE_DATA", help="Real images, as training takes them.")
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
    """Compare the planner's prediction with the engine on this machine."""
    loaded = load_bundle(bundle).at("int8" if int8 else "fp32")
    description, pixels = read_images(data, loaded, images)
    budget_mflops = budget_of(loaded, fraction)
    engine = build_engine(loaded, budget_mflops, device="cpu", n_lanes=lanes, max_rows=max_rows)
    engine.start()
    try:
        Load(engine, pixels[: len(pixels) // 2], 4 * engine.n_lanes * max_rows).run()  # steering settles
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
        Console().print(f"{n_refused} images were refused live: the streams were more than this machine could do")
    if json_path is not None:
        json_path.write_text(json.dumps([[asdict(pair) for pair in pairs] for pairs in found], indent=2) + "\n")


if __name__ == "__main__":
    run(main)
