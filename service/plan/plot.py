"""Plots a plan: latency over load, and its distribution at the requested rate."""

import sys
from collections.abc import Sequence
from pathlib import Path

from service.plan.planning import Outcome
from service.plan.report import Plan

LOADS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of a replica's capacity


class PlotError(RuntimeError):
    """A plot cannot be drawn; the message says what to do."""


def require_drawable(path: Path) -> None:
    """Check before planning that the plot can be drawn, so that no finished plan is lost.

    Raises:
        PlotError: the file's folder does not exist, its suffix is no image format, or matplotlib is missing (serving
            does not need it).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError(f"--plot needs matplotlib: {sys.executable} -m pip install matplotlib, or use --json") from None
    if path.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise PlotError(f"--plot {path}: the file name must end in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise PlotError(f"--plot {path}: there is no folder {path.parent}")


def draw(plan: Plan, by_rate: Sequence[tuple[float, Outcome]], path: Path) -> None:
    """Write a PNG, SVG or PDF, according to the suffix of `path`.

    Args:
        plan: the plan to plot.
        by_rate: (images/s, outcome) of one replica at several rates.
        path: the file to write.

    Raises:
        PlotError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    over_load, spread = figure.subplots(1, 2)
    rates = [rate for rate, _ in by_rate]
    for name in ("p50", "p95", "p99"):
        over_load.plot(rates, [getattr(outcome, f"{name}_ms") for _, outcome in by_rate], "o-", label=name)
    over_load.axvline(plan.saturated.images_per_s, color="0.5", linestyle=":", label="capacity")
    over_load.axvline(plan.replica_rate_per_s, color="C3", linestyle="--", label="requested")
    if plan.for_latency is not None:
        over_load.axhline(plan.for_latency.target_p99_ms, color="0.7", linewidth=1)
    over_load.set(xlabel="images/s on one replica", ylabel="latency, ms", yscale="log", title="Latency over load")
    over_load.legend()
    if plan.at_rate is None:
        spread.set_axis_off()
        spread.text(0.5, 0.5, "overload: the queue grows without end", ha="center", va="center")
    else:
        spread.hist(plan.at_rate.latencies_ms, bins=60, color="C0")
        spread.set(xlabel="latency, ms", ylabel="images", title=f"At {plan.replica_rate_per_s:,.0f} images/s")
    figure.suptitle(f"{plan.network}, budget {plan.setup.budget_mflops:.4g} MFLOPs: simulated")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise PlotError(f"--plot {path}: {error}") from None
