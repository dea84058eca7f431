"""The speed-up by early exits: the engine at a budget, compared with the same engine with exits off.

    python -m benchmarks.engine --bundle models/zoo/cifar100-msdnet --data cifar-100-python.tar.gz

Both serve the same images in turns, so that changes in the machine's speed affect both. The ratio is printed with the
ideal (what the engine's stage times allow at the exits that these images took: no copies, no decisions, full batches)
and the floor (multiply-adds at the machine's measured matrix product rate). Keep the machine otherwise idle.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.closed_loop import Load, Round, ideal_rate
from benchmarks.options import JsonPath
from benchmarks.running import budget_of, images_for, run
from models.bundle import Bundle, load_bundle
from service.assembly import build_engine
from service.engine.policies import POLICIES
from service.plan.measuring import full_row_seconds
from service.runners.onnx import OnnxRunner
from service.settled_memory import settle_memory

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Report:
    """Results for one scheduling policy; rates are images/s, medians over rounds."""

    bundle: str
    images: str
    n_images: int
    n_lanes: int
    policy: str
    budget_fraction: float
    with_exits: list[Round]
    exits_off: list[Round]
    stage_row_seconds: list[float]  # per row, full batches, all lanes busy; median of rounds
    ideals: list[float]  # images/s by round, at the measured exit shares
    ideals_off: list[float]
    matrix_product_gmacs_per_s: float  # all cores
    floor_images_per_s: float  # at the mean cost and that rate of multiply-adds

    @property
    def rate(self) -> float:
        return median(r.images_per_s for r in self.with_exits)

    @property
    def rate_off(self) -> float:
        return median(r.images_per_s for r in self.exits_off)

    @property
    def share_of_ideal(self) -> list[float]:
        return [on.images_per_s / ideal for on, ideal in zip(self.with_exits, self.ideals, strict=True)]

    @property
    def share_of_ideal_off(self) -> list[float]:
        return [off.images_per_s / ideal for off, ideal in zip(self.exits_off, self.ideals_off, strict=True)]

    @property
    def speed_up(self) -> float:
        """Median of the ratios within rounds."""
        pairs = zip(self.with_exits, self.exits_off, strict=True)
        return median(on.images_per_s / off.images_per_s for on, off in pairs)


def matrix_product_gmacs_per_s(size: int = 1536, repeats: int = 8) -> float:
    """10^9 float32 multiply-adds per second in a large matrix product on all cores, the best of `repeats`."""
    a = np.ones((size, size), np.float32)
    best_s = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ a
        best_s = min(best_s, time.perf_counter() - started)
    return size**3 / best_s / 1e9


def read_images(data: Path | None, bundle: Bundle, n_images: int) -> tuple[str, Images]:
    """A description and up to `n_images` test images of `data`; without it, noise, which no exit was calibrated on."""
    size = bundle.manifest.input
    if data is None:
        shape = (n_images, size.height_px, size.width_px, 3)
        return "SYNTHETIC noise: no headline", np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = images_for(bundle, data)
    chosen = np.random.default_rng(0).permutation(len(found.test_images))[:n_images]
    return f"{found.name} test images", found.test_images[chosen]


def measure(
    bundle: Bundle,
    images: Images,
    description: str,
    fraction: float,
    rounds: int,
    n_in_flight: int,
    policies: Sequence[str],
    **options: Any,
) -> list[Report]:
    """Serve the images `rounds` times with each policy and with exits off, in turns; returns a report per policy."""
    budget_mflops = budget_of(bundle, fraction)
    engines = [build_engine(bundle, budget_mflops, policy=policy, **options) for policy in policies]
    engines.append(build_engine(bundle, budget_mflops, exits=False, **options))
    results: list[list[Round]] = [[] for _ in engines]
    # Seconds per row of full batches with all lanes busy. The mix of stages is that of the budget, since stages that
    # run together compete for memory. Measured before and after every round, as the machine's speed varies.
    runner = OnnxRunner(bundle, engines[0].max_rows, engines[0].n_lanes)
    row_seconds: list[list[float]] = []
    off_row_seconds: list[list[float]] = []

    def in_between(run: Callable[[], object], mflops: float | None, found: list[list[float]]) -> None:
        before_s = full_row_seconds(runner, bundle, mflops)
        run()
        after_s = full_row_seconds(runner, bundle, mflops)
        found.append([0.5 * (a + b) for a, b in zip(before_s, after_s, strict=True)])

    def one_round(numbers: Sequence[int]) -> None:
        for i in numbers:
            results[i].append(Load(engines[i], images, n_in_flight).run())

    try:
        for engine in engines:
            engine.start()
            Load(engine, images[: len(images) // 4], n_in_flight).run()  # until steering settles and caches are filled
        settle_memory()  # as the server does
        for _ in range(rounds):
            in_between(partial(one_round, range(len(policies))), budget_mflops, row_seconds)
            in_between(partial(one_round, [len(policies)]), None, off_row_seconds)
    finally:
        for engine in engines:
            engine.drain(60)
    n_lanes = engines[0].n_lanes
    gmacs = matrix_product_gmacs_per_s()
    return [
        Report(
            bundle=f"{bundle.manifest.name} {bundle.manifest.version}",
            images=description,
            n_images=len(images),
            n_lanes=n_lanes,
            policy=policy,
            budget_fraction=fraction,
            with_exits=result,
            exits_off=results[-1],
            stage_row_seconds=[median(seconds) for seconds in zip(*row_seconds, strict=True)],
            ideals=[ideal_rate(row_s, r.shares, n_lanes) for row_s, r in zip(row_seconds, result, strict=True)],
            ideals_off=[n_lanes / sum(row_s) for row_s in off_row_seconds],
            matrix_product_gmacs_per_s=gmacs,
            floor_images_per_s=gmacs * 1e3 / median(r.mean_mflops for r in result),
        )
        for policy, result in zip(policies, results, strict=False)
    ]


def show(report: Report, console: Console) -> None:
    """Print a report as a table."""
    title = f"{report.bundle}: {report.n_images} {report.images}, {report.n_lanes} lanes, policy {report.policy}"
    table = Table("", "with exits", "exits off", title=title)
    pairs = [(report.with_exits, report.rate), (report.exits_off, report.rate_off)]
    spread = [
        f"{rate:.0f} ({min(r.images_per_s for r in rounds):.0f} to {max(r.images_per_s for r in rounds):.0f})"
        for rounds, rate in pairs
    ]
    last = [rounds[-1] for rounds, _ in pairs]
    table.add_row("images/s, median of rounds", *spread)
    table.add_row("speed-up", f"{report.speed_up:.2f} x", "1")
    table.add_row("ideal by stage times, images/s", *(f"{median(i):.0f}" for i in (report.ideals, report.ideals_off)))
    table.add_row(
        "share of the ideal reached",
        *(
            f"{median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
            for shares in (report.share_of_ideal, report.share_of_ideal_off)
        ),
    )
    table.add_row("floor by multiply-adds, images/s", f"{report.floor_images_per_s:.0f}", "")
    table.add_row("mean cost, M multiply-adds", *(f"{r.mean_mflops:.2f}" for r in last))
    table.add_row("run for images already answered, M", *(f"{r.idle_mflops:.2f}" for r in last))
    table.add_row("exit shares, %", *(" ".join(f"{100 * share:.0f}" for share in r.shares) for r in last))
    table.add_row("mean rows in an image's last batch", *(f"{r.mean_batch_rows:.1f}" for r in last))
    table.add_row("median time in the engine, ms", *(f"{r.median_ms:.1f}" for r in last))
    console.print(table)
    times = ", ".join(f"{1e3 * seconds:.2f}" for seconds in report.stage_row_seconds)
    console.print(f"stage times per row, ms: {times}; matrix product {report.matrix_product_gmacs_per_s:.0f} G MAC/s")


def known_policy(name: str) -> str:
    if name not in (*POLICIES, "all"):
        raise typer.BadParameter(f"{name!r}: choose {', '.join(POLICIES)}, or 'all'")
    return name


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")] = Path("models/zoo/cifar100-msdnet"),
    data: Annotated[
        Path | None, typer.Option(envvar="EXITSERVE_DATA", help="Image set, as for training; default: noise.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Budget, as a fraction of the full network's cost.")] = 0.4,
    images: Annotated[int, typer.Option(min=4, help="Images per round.")] = 2_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per engine.")] = 7,
    in_flight: Annotated[int, typer.Option(min=1, help="Images kept in flight.")] = 256,
    lanes: Annotated[int | None, typer.Option(min=1, help="Concurrent batches; by default, one per core.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="The largest batch.")] = 32,
    policy: Annotated[
        str, typer.Option(callback=known_policy, help=f"Scheduling policy: {', '.join(POLICIES)}, or 'all', in turns.")
    ] = "default",
    json_path: JsonPath = None,
) -> None:
    """Compare the engine at a budget with the same engine with exits off."""
    loaded = load_bundle(bundle)
    description, pixels = read_images(data, loaded, images)
    options = {"n_lanes": lanes, "max_rows": max_rows, "max_in_flight_rows": in_flight}
    policies = list(POLICIES) if policy == "all" else [policy]
    reports = measure(loaded, pixels, description, fraction, rounds, in_flight, policies, **options)
    for report in reports:
        show(report, Console())
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n")


if __name__ == "__main__":
    run(main)
