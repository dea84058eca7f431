"""Assembles an engine from a bundle."""

from math import inf

from models.bundle import Bundle
from service.budget.controller import BudgetController
from service.budget.ledger import window_for
from service.engine.engine import Engine
from service.engine.observer import Observer
from service.engine.scheduler import Scheduler
from service.runners.base import RunnerError, canvas_px_of
from service.runners.choice import Resize, RunnerName, open_runner
from service.runners.providers import Device


def default_burst_images(n_lanes: int, max_rows: int) -> float:
    """One batch of budgets per lane, at least 32.

    The rows that go on are in flight together in all lanes, and the ledger must cover what they spend beyond their own
    budgets, or it cuts images short that steering would let go on: with half as much, at 40 % of the full cost, 256 in
    flight and 2 lanes, one image in six in simulation, when that was the default; with the real network one in forty.
    """
    return max(32.0, float(n_lanes * max_rows))


def build_engine(
    bundle: Bundle,
    budget_mflops: float,
    *,
    runner_name: RunnerName = "auto",
    device: Device = "auto",
    n_lanes: int | None = None,
    compile_stages: bool = False,
    resize: Resize = "auto",
    max_rows: int = 32,
    policy: str = "default",
    burst_images: float | None = None,
    max_in_flight_rows: int = 1024,
    max_queue_s: float = inf,
    latency_s: float | None = None,
    steer: bool = True,
    exits: bool = True,
    observer: Observer | None = None,
) -> Engine:
    """Open a bundle's stages and return an engine that is not yet started (`Engine.start`).

    Args:
        budget_mflops: average per image, in millions of executed multiply-adds.
        runner_name, device, n_lanes, compile_stages, resize, max_rows: see `open_runner`.
        policy: a key of `policies.POLICIES`.
        burst_images, steer: see `BudgetController`; by default `default_burst_images`.
        max_in_flight_rows, observer: see `Engine`.
        max_queue_s: predicted wait beyond which images are refused.
        latency_s: latency target, for which the budget is lowered under load; see `Engine`.
        exits: False runs every image to the last exit, whatever the budget.

    Raises:
        ValueError: the budget is outside the range of the exits' costs, or the policy is unknown.
        StageLoadError, RunnerError: a stage cannot be opened.
    """
    costs_mflops = bundle.costs_mflops
    runner = open_runner(
        bundle,
        runner_name,
        device=device,
        n_lanes=n_lanes,
        max_rows=max_rows,
        max_in_flight_rows=max_in_flight_rows,
        compile_stages=compile_stages,
        resize=resize,
    )
    if resize == "device" and not canvas_px_of(runner):
        raise RunnerError(
            "--resize device needs the runner torch-cuda, which alone scales images there: use --resize auto"
        )
    return Engine(
        runner,
        BudgetController(
            bundle.frontier(),
            costs_mflops,
            budget_mflops if exits else costs_mflops[-1],
            default_burst_images(runner.n_lanes, max_rows) if burst_images is None else burst_images,
            steer and exits,
            window_for(max_in_flight_rows),
        ),
        Scheduler(runner.n_stages, max_rows, policy=policy),
        bundle.score(),
        bundle.manifest.class_names,
        max_in_flight_rows,
        exits,
        observer,
        max_queue_s,
        latency_s,
    )
