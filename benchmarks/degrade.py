"""A latency target in action: open-loop traffic rises above the capacity at the full budget, then falls below it.

    python -m benchmarks.degrade --target-ms 50 --data cifar-100-python.tar.gz

Images arrive at random (Poisson), whether or not answers keep up, and latency counts from when each was due. Rates are
multiples of the capacity at the full budget, which is measured first, with exits on and enough images in flight to
saturate the engine. Keep the machine otherwise idle.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.closed_loop import Load
from benchmarks.engine import read_images
from benchmarks.options import JsonPath, writable
from benchmarks.running import budget_of, run
from models.bundle import Bundle, load_bundle
from service.assembly import build_engine
from service.budget.state import BudgetState
from service.engine.engine import Engine
from service.engine.rows import Answer, Told
from service.errors import EngineOverloaded
from service.settled_memory import settle_memory


@dataclass(frozen=True)
class Slice:
    """Results for the images that were due in one interval."""

    from_s: float
    offered_per_s: float
    answered_per_s: float
    refused: int
    p50_ms: float  # over answers; NaN if there are none
    p95_ms: float
    working_mflops: float  # this and the rest: the engine's state at the end of the slice
    expected_accuracy: float
    limited: bool


@dataclass(frozen=True)
class Report:
    bundle: str
    images: str
    n_lanes: int
    capacity_per_s: float  # at the full budget, measured
    target_ms: float | None
    budget_mflops: float
    phases: list[tuple[float, float]]  # seconds, multiple of the capacity
    slices: list[Slice]


class Traffic:
    """Sends images at given times and records their latencies."""

    def __init__(self, engine: Engine, images: NDArray[np.uint8]) -> None:
        self.took_s: list[tuple[float, float]] = []  # (when it was due, from the start; its latency, NaN if it failed)
        self._engine = engine
        self._images = images
        self._started_s = 0.0
        self._n_out = 0
        self._changed = threading.Condition()

    def run(self, due_s: Sequence[float], slice_s: float, at_slice: Callable[[], None]) -> None:
        """Send an image at each of `due_s`, counted from now, and call `at_slice` at the end of every slice."""
        self._started_s = time.perf_counter()
        next_slice_s = slice_s
        for i, due in enumerate(due_s):
            while next_slice_s <= due:
                self._sleep_until(next_slice_s)
                at_slice()
                next_slice_s += slice_s
            self._sleep_until(due)
            with self._changed:
                self._n_out += 1
            try:
                self._engine.submit_to(self._take, due, self._images[i % len(self._images)])
            except EngineOverloaded:
                self._note([(due, nan)])
        self._sleep_until(next_slice_s)
        at_slice()
        with self._changed:
            if not self._changed.wait_for(lambda: self._n_out == 0, timeout=60):
                raise RuntimeError(f"{self._n_out} images were not answered within a minute")

    def _sleep_until(self, moment_s: float) -> None:
        if (left_s := moment_s - (time.perf_counter() - self._started_s)) > 0:
            time.sleep(left_s)

    def _take(self, outcomes: list[tuple[Any, Told]]) -> None:
        now_s = time.perf_counter() - self._started_s
        noted = []
        for due, outcome in outcomes:
            took_s = now_s - due if isinstance(outcome, Answer) else nan
            if isinstance(outcome, Answer):
                self._engine.took(took_s)
            noted.append((due, took_s))
        self._note(noted)

    def _note(self, took_s: list[tuple[float, float]]) -> None:
        with self._changed:
            self.took_s += took_s
            self._n_out -= len(took_s)
            self._changed.notify_all()


def arrivals(phases: Sequence[tuple[float, float]], capacity_per_s: float, seed: int) -> list[float]:
    """Times in seconds of a Poisson process whose rate changes with the phase."""
    rng = np.random.default_rng(seed)
    due_s: list[float] = []
    began_s = 0.0
    for seconds, multiple in phases:
        n_images = rng.poisson(seconds * multiple * capacity_per_s)
        due_s += (began_s + np.sort(rng.random(n_images)) * seconds).tolist()
        began_s += seconds
    return due_s


def slices(took_s: Sequence[tuple[float, float]], states: Sequence[BudgetState], slice_s: float) -> list[Slice]:
    """Group the latencies by when the images were due; `states` has one state per slice."""
    found = []
    due, took = np.array(took_s).reshape(-1, 2).T
    for i, state in enumerate(states):
        inside = took[(due >= i * slice_s) & (due < (i + 1) * slice_s)]
        answered = inside[~np.isnan(inside)]
        p50_s, p95_s = np.percentile(answered, [50, 95]) if len(answered) else (nan, nan)
        found.append(
            Slice(
                from_s=i * slice_s,
                offered_per_s=len(inside) / slice_s,
                answered_per_s=len(answered) / slice_s,
                refused=len(inside) - len(answered),
                p50_ms=1e3 * float(p50_s),
                p95_ms=1e3 * float(p95_s),
                working_mflops=state.working_mflops,
                expected_accuracy=state.expected_accuracy,
                limited=state.latency is not None and state.latency.limited_s is not None,
            )
        )
    return found


def measure(
    bundle: Bundle,
    images: NDArray[np.uint8],
    description: str,
    target_ms: float | None,
    phases: list[tuple[float, float]],
    slice_s: float = 1.0,
    fraction: float = 1.0,
    n_lanes: int | None = None,
    seed: int = 0,
) -> Report:
    """Measure the capacity at the highest budget, `fraction` of the full cost, then run the phases."""
    budget_mflops = budget_of(bundle, fraction)
    latency_s = None if target_ms is None else target_ms / 1e3
    engine = build_engine(bundle, budget_mflops, n_lanes=n_lanes)  # refuses for the target alone, or at 1,024
    try:
        engine.start()
        in_flight = 4 * engine.n_lanes * engine.max_rows
        Load(engine, images[: len(images) // 4], in_flight).run()  # until steering settles and caches are filled
        settle_memory()  # as the server does
        capacity_per_s = Load(engine, images, in_flight).run().images_per_s
        engine.set_budget(budget_mflops, latency_s)
        traffic, states = Traffic(engine, images), []
        traffic.run(arrivals(phases, capacity_per_s, seed), slice_s, lambda: states.append(engine.budget_state()))
    finally:
        engine.drain(60)
    return Report(
        bundle=f"{bundle.manifest.name} {bundle.manifest.version}",
        images=description,
        n_lanes=engine.n_lanes,
        capacity_per_s=capacity_per_s,
        target_ms=target_ms,
        budget_mflops=budget_mflops,
        phases=phases,
        slices=slices(traffic.took_s, states, slice_s),
    )


def show(report: Report, console: Console) -> None:
    """Print a report as a table, one row per slice."""
    target = "no latency target" if report.target_ms is None else f"95 % within {report.target_ms:g} ms"
    title = (
        f"{report.bundle}: {report.images}, {report.n_lanes} lanes, {target}; "
        f"capacity at {report.budget_mflops:.1f} M: {report.capacity_per_s:.0f} images/s"
    )
    names = (
        "from s",
        "offered/s",
        "answered/s",
        "refused",
        "p50 ms",
        "p95 ms",
        "working M",
        "expected accuracy",
        "limited",
    )
    table = Table(*names, title=title)
    for row in report.slices:
        table.add_row(
            f"{row.from_s:g}",
            f"{row.offered_per_s:.0f}",
            f"{row.answered_per_s:.0f}",
            f"{row.refused}",
            f"{row.p50_ms:.1f}",
            f"{row.p95_ms:.1f}",
            f"{row.working_mflops:.1f}",
            f"{row.expected_accuracy:.1%}",
            "yes" if row.limited else "",
        )
    console.print(table)


def draw(report: Report, path: Path) -> None:
    """Plot load, p95, working budget and expected accuracy over time into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    middle_s = [row.from_s + (report.slices[1].from_s if len(report.slices) > 1 else 1.0) / 2 for row in report.slices]
    axes[0].plot(middle_s, [row.offered_per_s for row in report.slices], label="offered")
    axes[0].plot(middle_s, [row.answered_per_s for row in report.slices], "--", label="answered")
    axes[0].axhline(report.capacity_per_s, color="grey", linestyle=":", label="capacity at the ceiling")
    axes[1].plot(middle_s, [row.p95_ms for row in report.slices], label="p95")
    if report.target_ms is not None:
        axes[1].axhline(report.target_ms, color="grey", linestyle=":", label="target")
    axes[2].plot(middle_s, [row.working_mflops for row in report.slices], label="working budget")
    axes[2].axhline(report.budget_mflops, color="grey", linestyle=":", label="budget as set")
    axes[3].plot(middle_s, [100 * row.expected_accuracy for row in report.slices], label="expected accuracy")
    for axis, label in zip(axes, ("images/s", "ms", "M per image", "% right"), strict=True):
        axis.set_ylabel(label)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # outside, where it covers no line
    for axis in axes[:3]:
        axis.set_ylim(bottom=0)
    axes[0].set_title(report.bundle)
    axes[3].set_xlabel("seconds")
    figure.savefig(path)


def read_phases(text: str) -> list[tuple[float, float]]:
    """Parse phases such as `5x0.4,15x1.5`: seconds, and multiples of the capacity.

    Raises:
        typer.BadParameter: malformed, or a number out of range.
    """
    try:
        phases = [
            (float(seconds), float(multiple)) for seconds, multiple in (part.split("x") for part in text.split(","))
        ]
        if any(not (0 < seconds < 3600 and 0 < multiple < 100) for seconds, multiple in phases):
            raise ValueError(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: give seconds x multiple of the capacity, as in 5x0.4,15x1.5") from None
    return phases


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")] = Path("models/zoo/cifar100-msdnet"),
    data: Annotated[
        Path | None, typer.Option(envvar="EXITSERVE_DATA", help="Image set, as for training; default: noise.")
    ] = None,
    target_ms: Annotated[
        float, typer.Option(min=0.0, help="Latency target for 95 % of images, in ms; 0: none.")
    ] = 50.0,
    phases: Annotated[
        str, typer.Option(help="Phases of load, as seconds x multiple of the capacity.")
    ] = "8x0.4,20x1.5,12x0.4",
    slice_s: Annotated[float, typer.Option(min=0.01, help="Seconds per row of the table.")] = 1.0,
    fraction: Annotated[float, typer.Option(help="Highest budget, as a fraction of the full network's cost.")] = 1.0,
    images: Annotated[int, typer.Option(min=4, help="Distinct images, sent repeatedly.")] = 2_000,
    lanes: Annotated[int | None, typer.Option(min=1, help="Concurrent batches; by default, one per core.")] = None,
    json_path: JsonPath = None,
    figure: Annotated[
        Path | None, typer.Option(callback=writable, help="Save a plot to this file, e.g. docs/figures/degrade.svg.")
    ] = None,
) -> None:
    """Show how a latency target lowers the budget under load, and how the budget recovers."""
    when = read_phases(phases)
    loaded = load_bundle(bundle)
    description, pixels = read_images(data, loaded, images)
    report = measure(loaded, pixels, description, target_ms or None, when, slice_s, fraction, n_lanes=lanes)
    show(report, Console())
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(report), indent=2) + "\n")
    if figure is not None:
        draw(report, figure)


if __name__ == "__main__":
    run(main)
