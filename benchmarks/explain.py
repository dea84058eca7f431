"""Draws the figures of docs/how-it-works.md from the bundle that ships: `python -m benchmarks.explain`.

The bundle's held-out scores pass through the service's own scheduler and budget. Only the batch times are assumed.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.running import run
from models.bundle import Bundle, load_bundle
from service.budget.controller import BudgetController
from service.budget.ledger import Account
from service.engine.costs import CostTable
from service.engine.scheduler import Scheduler
from training.figures import figure_axes

BUNDLE = Path("models/zoo/cifar100-msdnet")
FOLDER = Path("docs/figures")
MAX_ROWS = 32
WARM_UP_BATCHES, SHOWN_BATCHES = 400, 60
FRACTION = 0.4
PART_S = 0.3e-3  # assumed time of a batch, and again of each of its rows; the document states it


def draw_shares(bundle: Bundle, path: Path) -> None:
    """Exit shares and accuracy of held-out images by average cost."""
    frontier = bundle.frontier()
    n_exits = len(bundle.costs_mflops)
    with figure_axes(path, "What the budget changes (5,000 held-out images)", n_columns=2) as (left, right):
        shares = 100 * np.array(frontier.shares).T
        labels = [f"exit {k}" for k in range(1, n_exits + 1)]
        left.stackplot(frontier.cost, shares, labels=labels, colors=_colours(n_exits))
        left.set(xlabel="average cost, M multiply-adds", ylabel="images that leave, %", ylim=(0, 100))
        left.margins(x=0)
        left.legend(loc="lower left", reverse=True, frameon=True)
        right.plot(frontier.cost, 100 * np.array(frontier.accuracy), label="each image leaves when confident")
        accuracy = [100 * entry.heldout_accuracy for entry in bundle.manifest.exits]
        right.plot(bundle.costs_mflops, accuracy, "o--", color="grey", label="all images leave at one exit")
        right.set(xlabel="average cost, M multiply-adds", ylabel="accuracy, %")
        right.legend(loc="lower right")


def draw_batches(bundle: Bundle, path: Path) -> None:
    """Stage and rows of consecutive batches as the scheduler forms them, with one lane and images always waiting."""
    batches = run_batches(bundle, WARM_UP_BATCHES + SHOWN_BATCHES)[WARM_UP_BATCHES:]
    colours = _colours(len(bundle.costs_mflops))
    with figure_axes(path, f"{SHOWN_BATCHES} consecutive batches, at {FRACTION:.0%} of the full cost", 2) as (
        left,
        right,
    ):
        for stage, colour in enumerate(colours):
            chosen = [(i, rows) for i, (at, rows, _) in enumerate(batches) if at == stage]
            left.bar(
                [i for i, _ in chosen], [n for _, n in chosen], color=colour, label=f"stage {stage + 1}", width=0.9
            )
            rows, stayed = (sum(b[which] for b in batches if b[0] == stage) for which in (1, 2))
            right.bar(stage + 1, rows, color=colour, alpha=0.35)
            right.bar(stage + 1, stayed, color=colour)
        left.set(xlabel="batch", ylabel="images in the batch", ylim=(0, 40))
        left.legend(ncols=len(colours), loc="upper center", columnspacing=0.8, handlelength=1)
        right.set(xlabel="stage", ylabel="images that ran it (pale) and continued (full)")


def run_batches(bundle: Bundle, n_batches: int) -> list[tuple[int, int, int]]:
    """Serve randomly drawn held-out images on one lane; returns (stage, rows, rows that continued) of every batch."""
    scores = bundle.calibration.scores[bundle.manifest.score].tolist()
    costs = bundle.costs_mflops
    budget = BudgetController(bundle.frontier(), costs, FRACTION * costs[-1])
    table = CostTable([{1: 2 * PART_S, MAX_ROWS: (1 + MAX_ROWS) * PART_S}] * len(costs))
    scheduler: Scheduler[int] = Scheduler(len(costs), MAX_ROWS, costs=table)
    images = np.random.default_rng(0).integers(len(scores), size=n_batches * MAX_ROWS).tolist()
    accounts: dict[int, Account] = {}
    batches: list[tuple[int, int, int]] = []
    arrived = 0
    for batch in range(n_batches):
        now_s = batch * 0.01
        arriving = range(arrived, arrived + MAX_ROWS - scheduler.queued_rows(0))
        accounts.update(dict.fromkeys(arriving, budget.admit(len(arriving))))
        scheduler.add(arriving, 0, now_s)
        arrived = arriving.stop
        picked = scheduler.pick(now_s)
        assert picked is not None
        stage, rows = picked
        ran = [accounts[row] for row in rows]
        reasons = budget.decide(ran, stage + 1, [scores[images[row]][stage] for row in rows])
        going_on = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        budget.refresh()
        if going_on:
            scheduler.add(going_on, stage + 1, now_s)
        batches.append((stage, len(rows), len(going_on)))
    return batches


def draw_costs(bundle: Bundle, path: Path) -> None:
    """The cost of stopping at each exit: of the network's program up to it, and of the stages that are executed."""
    at = np.arange(1, len(bundle.costs_mflops) + 1)
    with figure_axes(path, "Cost of stopping at an exit") as (axes,):
        for shift, label, costs, colour in (
            (
                -0.2,
                "the network's program up to the exit",
                [e.published_mflops for e in bundle.manifest.exits],
                "silver",
            ),
            (0.2, "the stages up to the exit, as executed", bundle.costs_mflops, _colours(3)[0]),
        ):
            bars = axes.bar(at + shift, costs, 0.4, label=label, color=colour)
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.set(xlabel="exit", ylabel="M multiply-adds")
        axes.legend(loc="upper left")


def _colours(n: int) -> list[tuple[float, float, float, float]]:
    colours = mpl.colormaps["viridis"]
    return [colours(float(x)) for x in np.linspace(0.15, 0.95, n)]


def main() -> None:
    """Redraw the figures of docs/how-it-works.md in docs/figures."""
    bundle = load_bundle(BUNDLE)
    draw_shares(bundle, FOLDER / "how-shares.png")
    draw_batches(bundle, FOLDER / "how-batches.png")
    draw_costs(bundle, FOLDER / "how-costs.png")


if __name__ == "__main__":
    run(main)
