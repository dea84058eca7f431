"""Puts an engine together from a bundle."""

from models.bundle import Bundle
from models.exits import SCORES
from service.budget import BudgetController
from service.engine import Engine
from service.observer import Observer
from service.runners.onnx import Device, OnnxRunner
from service.scheduler import Scheduler


def build_engine(
    bundle: Bundle,
    budget_mflops: float,
    *,
    device: Device = "auto",
    n_lanes: int | None = None,
    max_rows: int = 32,
    max_wait_s: float = 0.05,
    policy: str = "default",
    burst_images: float = 32.0,
    max_in_flight_rows: int = 1024,
    lookahead_batches: int = 1,
    steer: bool = True,
    exits: bool = True,
    observer: Observer | None = None,
) -> Engine:
    """Open a bundle's stages and return an engine, not yet started (`Engine.start`).

    Args:
        bundle: as loaded.
        budget_mflops: average per image, millions of multiply-adds as executed.
        device, n_lanes, max_rows: see `OnnxRunner`.
        max_wait_s, policy: see `Scheduler`.
        burst_images, steer: see `BudgetController`.
        max_in_flight_rows, lookahead_batches, observer: see `Engine`.
        exits: False runs every image to the last exit, whatever the budget.

    Raises:
        ValueError: the budget is out of the network's reach, or the policy unknown.
        StageLoadError, RunnerError: a stage cannot be opened.
    """
    costs_mflops = bundle.costs_mflops
    runner = OnnxRunner(bundle, max_rows, n_lanes, device)
    return Engine(
        runner,
        BudgetController(
            bundle.frontier(),
            costs_mflops,
            budget_mflops if exits else costs_mflops[-1],
            burst_images,
            steer and exits,
        ),
        Scheduler(runner.n_stages, max_rows, max_wait_s, policy=policy),
        SCORES[bundle.manifest.score],
        bundle.manifest.class_names,
        max_in_flight_rows,
        lookahead_batches,
        exits,
        observer,
    )
