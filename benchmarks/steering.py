"""How well steering keeps budgets, and at what cost: the real core, budget and scheduler under a virtual clock.

    python -m benchmarks.steering --data cifar-100-python.tar.gz

Exit scores are those of test images, or by default of a bundle's held-out ones. The images come in many random orders,
and batches take random times. At every answer, the mean cost of the last 1,000 (or of four times the images in flight,
if more than 1,024 are) is compared with the budget, and finally the accuracy with that of fixed thresholds of the same
mean cost. Nothing is timed: the same seed gives the same table on any machine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from benchmarks.options import numbers
from benchmarks.running import budget_of, images_for, run
from models.bundle import Bundle, load_bundle
from models.exits import outcome
from models.frontier import Frontier
from models.scores import score_exits
from service.budget.ledger import MANY_IN_FLIGHT, ROLLING_ANSWERS, window_for
from service.plan.arrivals import poisson
from service.plan.simulation import Network, Record, Setup, Simulation
from service.plan.stage_times import StageTimes
from training.stage_sessions import StageSessions

SETTLING_ANSWERS = 2_000  # answers before `lowest` and `highest` count, at least
SETTLING_ROUNDS, ROUNDS = 4, 12  # the same, and all answers of a run, at least, in multiples of the images in flight
GMACS_PER_S = 30.0  # of a lane; arbitrary: it only scales time
FIXED_SHARE = 0.1  # of a full batch's time, taken by a batch of any size
SPREAD = (0.7, 0.8, 0.9, 1.0, 1.0, 1.1, 1.2, 1.6, 3.0)  # factors of batches' times; the last is a stall
N_POSITIONS = 65


@dataclass(frozen=True)
class Traffic:
    """How images arrive, and the lanes that serve them."""

    name: str
    n_lanes: int
    max_rows: int
    n_in_flight: int | None = None  # constant number (closed loop); None: Poisson arrivals at `load`
    load: float = 0.0  # share of the lanes' capacity


TRAFFICS = (
    Traffic("1 client", 1, 32, 1),
    Traffic("8 clients, 2 lanes", 2, 32, 8),
    Traffic("32 clients, 2 lanes", 2, 32, 32),
    Traffic("Poisson, 60 %, 2 lanes", 2, 32, load=0.6),
    Traffic("256 clients, 2 lanes", 2, 32, 256),
    Traffic("256 clients, 8 lanes", 8, 32, 256),
    Traffic("1,000 clients, 2 lanes of 128", 2, 128, 1_000),  # about the most for which the window is 1,000 answers
    Traffic("2,048 clients, 2 lanes of 256", 2, 256, 2_048),
    Traffic("4,096 clients, 2 lanes of 512", 2, 512, 4_096),
    Traffic("8,192 clients, 2 lanes of 1,024", 2, 1_024, 8_192),
)


@dataclass(frozen=True)
class Order:
    """Results for one order of the images. Mean costs are divided by the budget."""

    at_end: float  # over the last window: 1,000 answers or more, see `ledger.window_for`
    lowest: float  # over any window, once settled
    highest: float
    lost: float  # accuracy of fixed thresholds of the same mean cost, minus ours
    cut_short: float  # share of the images that left for the budget alone


def network_of(bundle: Bundle, data: Path | None = None) -> tuple[Network, str]:
    """A bundle's exit scores on the test images of `data`, or on its held-out ones; returns a description, too."""
    calibration, costs_mflops, frontier = bundle.calibration, bundle.costs_mflops, bundle.frontier()
    if data is None:
        scores = calibration.scores[bundle.manifest.score]
        return Network(scores, calibration.correct, costs_mflops, frontier), f"{len(scores):,} held-out images"
    found = images_for(bundle, data)
    logits = StageSessions(bundle.path, bundle.manifest.stages).run(found.test_images, "test images")
    correct = np.stack([x.argmax(axis=1) for x in logits], axis=1) == found.test_labels[:, None]
    network = Network(score_exits(bundle.score(), logits), correct, costs_mflops, frontier)
    return network, f"{len(correct):,} test images of {found.name}"


def times_of(network: Network, traffic: Traffic) -> StageTimes:
    """Stage times proportional to cost, plus a tenth of a full batch's time for a batch of any size."""
    stage_seconds = []
    for mflops in np.diff([0.0, *network.costs_mflops]).tolist():
        full_s = traffic.max_rows * mflops / GMACS_PER_S / 1e3
        stage_seconds.append({1: (FIXED_SHARE + 1 / traffic.max_rows) * full_s, traffic.max_rows: full_s})
    return StageTimes(
        network="none: in proportion to the costs",
        machine="none",
        n_lanes=traffic.n_lanes,
        n_cores=traffic.n_lanes,
        lanes_take_cores=False,
        alone_speed=1.0,
        stage_seconds=tuple(stage_seconds),
        spread=SPREAD,
        copy_row_seconds=(0.0,) * len(stage_seconds),
        host_image_seconds=0.0,
        host_batch_seconds=0.0,
        wake_seconds=(0.0,),
    )


def simulate(network: Network, traffic: Traffic, budget_mflops: float, n_images: int, seed: int) -> Order:
    """Run the images once, in the random order of `seed`."""
    in_flight = traffic.n_in_flight or MANY_IN_FLIGHT
    setup = Setup(budget_mflops, traffic.n_lanes, traffic.n_lanes, traffic.max_rows, max_in_flight=in_flight)
    simulation = Simulation(network, times_of(network, traffic), setup, seed)
    if traffic.n_in_flight is None:
        rate_per_s = traffic.load * traffic.n_lanes * GMACS_PER_S * 1e3 / budget_mflops
        record = simulation.run(poisson(rate_per_s, n_images, seed).tolist())
    else:
        record = simulation.saturate(max(n_images, ROUNDS * traffic.n_in_flight), traffic.n_in_flight)
    n_settling = max(SETTLING_ANSWERS, SETTLING_ROUNDS * (traffic.n_in_flight or 0))
    return judge(network, record, budget_mflops, n_settling, partial(accuracy_at, network), window_for(in_flight))


def judge(
    network: Network,
    record: Record,
    budget_mflops: float,
    n_settling: int,
    fixed_accuracy: Callable[[NDArray[np.intp], float], float],
    window_answers: int = ROLLING_ANSWERS,
) -> Order:
    """Evaluate a run; `fixed_accuracy` maps row indices and a mean cost to the accuracy of fixed thresholds."""
    sums = np.cumsum([0, *record.spent])  # integers: exact
    windows = (sums[window_answers:] - sums[:-window_answers]) / window_answers / 1e6 / budget_mflops
    settled = windows[max(0, n_settling - window_answers) :]
    rows, exits = np.array(record.row), np.array(record.exit) - 1
    right = network.correct[rows, exits].mean()
    cost_mflops = float(np.mean(record.spent)) / 1e6
    return Order(
        at_end=float(windows[-1]),
        lowest=float(settled.min()),
        highest=float(settled.max()),
        lost=float(fixed_accuracy(rows, cost_mflops) - right),
        cut_short=record.reason.count("budget") / len(rows),
    )


def accuracy_at(network: Network, rows: NDArray[np.intp], cost_mflops: float) -> float:
    """Accuracy on these rows of the fixed thresholds that cost `cost_mflops` on average on them."""
    scores, correct = network.scores[rows], network.correct[rows]
    costs, accuracies = zip(*_fixed(network.frontier, scores, correct, network.costs_mflops), strict=True)
    return float(np.interp(cost_mflops, costs, accuracies))


def _fixed(
    frontier: Frontier, scores: NDArray[np.float64], correct: NDArray[np.bool_], costs_mflops: Sequence[float]
) -> Iterator[tuple[float, float]]:
    for position in np.linspace(0.0, 1.0, N_POSITIONS).tolist():
        found = outcome(scores, correct, costs_mflops, frontier.at(position).thresholds)
        yield found.mean_cost, found.accuracy


def show(title: str, found: list[tuple[float, Traffic, list[Order]]], console: Console) -> None:
    table = Table(
        "%",
        Column("traffic", no_wrap=True),
        "window at the end",
        "at any answer",
        "points lost",
        "cut short, %",
        title=title,
    )
    for fraction, traffic, orders in found:
        at_end = [order.at_end for order in orders]
        lost = [100 * order.lost for order in orders]
        table.add_row(
            f"{100 * fraction:.0f}",
            traffic.name,
            f"{min(at_end):.4f} to {max(at_end):.4f}",
            f"{min(order.lowest for order in orders):.3f} to {max(order.highest for order in orders):.3f}",
            f"{np.mean(lost):.2f} ({np.std(lost):.2f})",
            f"{100 * np.mean([order.cut_short for order in orders]):.2f}",
        )
    console.print(table)


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")] = Path("models/zoo/cifar100-msdnet"),
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="EXITSERVE_DATA",
            help="Image set, as for training; by default, the bundle's held-out scores.",
        ),
    ] = None,
    fractions: Annotated[
        str, typer.Option(help="Budgets, as fractions of the full network's cost, comma-separated.")
    ] = "0.25,0.4,0.6",
    orders: Annotated[int, typer.Option(min=2, help="Random orders per case.")] = 12,
    images: Annotated[int, typer.Option(min=SETTLING_ANSWERS + 1, help="Images per order.")] = 7_000,
) -> None:
    """Show how well steering keeps budgets, and what accuracy that costs, under a virtual clock."""
    loaded = load_bundle(bundle)
    budgets = {fraction: budget_of(loaded, fraction) for fraction in numbers(fractions, "0.25,0.4")}
    network, name = network_of(loaded, data)
    cases = [(fraction, traffic) for fraction in budgets for traffic in TRAFFICS]
    found = []
    for fraction, traffic in tqdm(cases, disable=None):
        done = [simulate(network, traffic, budgets[fraction], images, seed) for seed in range(orders)]
        found.append((fraction, traffic, done))
    title = f"{loaded.manifest.name} {loaded.manifest.version}: {orders} orders of {images:,} of {name}"
    show(f"{title}, mean costs divided by the budget", found, Console())


if __name__ == "__main__":
    run(main)
