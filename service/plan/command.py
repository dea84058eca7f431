"""`python -m service plan`: predicts servers needed, latency and accuracy before there is any traffic.

Exit codes: 0 planned, 1 planned and overloaded, 2 the command cannot be carried out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

from models.bundle import Bundle, BundleError, load_bundle
from models.onnx_weights import StageLoadError
from service.budget.ledger import MANY_IN_FLIGHT
from service.budget.target import TargetError, Targets
from service.engine.policies import POLICIES
from service.plan import plot
from service.plan.measuring import measure
from service.plan.neighbours import Neighbours
from service.plan.planning import Planner
from service.plan.report import Plan
from service.plan.simulation import Network, Setup
from service.plan.stage_times import StageTimes, StageTimesError, require_stages
from service.runners.base import RunnerError
from service.settings import MAX_BATCH_ROWS, MAX_LANES

ZOO = Path("models/zoo")
IMAGES = 8_000
BUSY = 0.1  # share of the cores used by other processes beyond which a measurement is unreliable
MOST_IMAGES = 2_000_000
MOST = 100_000  # limit of options that are counts


class PlanError(Exception):
    """The command cannot be carried out; the message says why and what to do."""


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service plan",
        description=(
            "Plan for a load: the server's own scheduler and budget under a virtual clock, with stage times measured\n"
            "on this processor (or --stage-times) and the scores of held-out images. One replica at its share of\n"
            "the rate stands for all of them. docs/planning.md says what this leaves out."
        ),
        epilog=(
            "Examples:\n"
            "  python -m service plan --rate 2000 --budget 40%\n"
            "  python -m service plan --model imagenette-msdnet --rate 500 --replicas 4 --p99-ms 150\n"
            "  python -m service plan --rate 1000 --save-stage-times here.json\n"
            "  python -m service plan --rate 20000 --replicas 8 --stage-times here.json --plot plan.png"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=_positive, required=True, metavar="N", help="images per second, over all replicas")
    load.add_argument("--replicas", type=_count, default=1, metavar="N", help="servers that share the rate (1)")
    # A server refuses the rest of a larger burst, and too few of them would be simulated to be meaningful.
    burst = partial(_count, most=MANY_IN_FLIGHT)
    load.add_argument(
        "--bursts", type=burst, default=1, metavar="N", help="images arrive N at once, at each replica (1)"
    )
    load.add_argument("--p99-ms", type=_positive, metavar="MS", help="find how many replicas keep this p99 latency")
    load.add_argument("--seconds", type=_positive, metavar="S", help=f"seconds to simulate (as {IMAGES:,} images take)")
    load.add_argument("--seed", type=_seed, default=0, metavar="N", help="random seed of arrivals and images (0)")
    server = parser.add_argument_group("server")
    server.add_argument(
        "--model", default="cifar100-msdnet", metavar="NAME", help=f"a bundle of {ZOO}, or a folder (%(default)s)"
    )
    budget = server.add_mutually_exclusive_group()
    budget.add_argument(
        "--budget", default="100%", metavar="B", help="a share such as 40%%, or MFLOPs per image such as 24 (100%%)"
    )
    budget.add_argument(
        "--accuracy", type=_positive, metavar="SHARE", help="use the budget that reaches this on held-out images"
    )
    server.add_argument("--precision", choices=("fp32", "int8"), default="fp32", help="of stages (%(default)s)")
    server.add_argument(
        "--lanes",
        type=partial(_count, most=MAX_LANES),
        metavar="N",
        help="batches that run concurrently (one per core)",
    )
    server.add_argument(
        "--max-batch-rows",
        type=partial(_count, most=MAX_BATCH_ROWS),
        default=32,
        metavar="N",
        help="most images in one batch (%(default)s)",
    )
    server.add_argument("--policy", choices=POLICIES, default="default", help="scheduling policy (%(default)s)")
    times = parser.add_argument_group("times")
    times.add_argument(
        "--stage-times", type=Path, metavar="FILE", help="read stage times from FILE instead of measuring"
    )
    times.add_argument("--save-stage-times", type=Path, metavar="FILE", help="write the stage times measured here")
    times.add_argument("--cores", type=_count, metavar="N", help="cores that lanes and host share (as measured)")
    times.add_argument(
        "--host-us",
        type=_not_negative,
        default=0.0,
        metavar="US",
        help="CPU time per image outside the engine, in us: about 110 for HTTP and decoding of a small PNG (0)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print a JSON document instead of text")
    output.add_argument("--plot", type=Path, metavar="FILE", help="also plot latency over load, as PNG or SVG")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Plan, print, and return the exit code."""
    given = command_line().parse_args(arguments)
    try:
        if given.plot is not None:
            plot.require_drawable(given.plot)
        plan, planner = _plan(given)
        if given.plot is not None:
            capacity = plan.saturated.images_per_s
            _report("simulating other loads for the plot")
            plot.draw(
                plan, [(load * capacity, planner.at(load * capacity, IMAGES // 2)) for load in plot.LOADS], given.plot
            )
    except (PlanError, BundleError, StageLoadError, RunnerError, TargetError, StageTimesError, plot.PlotError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    text = json.dumps(plan.document(), indent=1) if given.json else "\n".join(plan.lines())
    sys.stdout.write(text + "\n")
    return 1 if plan.is_overloaded else 0


def _plan(given: argparse.Namespace) -> tuple[Plan, Planner]:
    bundle = _load(given.model).at(given.precision)
    frontier = bundle.frontier()
    budget_mflops = _budget(given, Targets(frontier, bundle.costs_mflops))
    n_images = _n_images(given)
    times = _times(given, bundle, budget_mflops)
    setup = Setup(
        budget_mflops=budget_mflops,
        n_lanes=given.lanes or times.n_lanes,
        n_cores=given.cores or times.n_cores,
        max_rows=given.max_batch_rows,
        policy=given.policy,
        http_image_s=given.host_us / 1e6,
    )
    calibration = bundle.calibration
    network = Network(calibration.scores[bundle.manifest.score], calibration.correct, bundle.costs_mflops, frontier)
    planner = Planner(network, times, setup, given.seed, given.bursts)
    _report("simulating")
    saturated = planner.saturated()
    rate = given.rate / given.replicas
    plan = Plan(
        network=f"{bundle.manifest.name} {bundle.manifest.version} in {bundle.precision}",
        full_mflops=bundle.costs_mflops[-1],
        setup=setup,
        times=times,
        rate_per_s=given.rate,
        n_replicas=given.replicas,
        at_once=given.bursts,
        seed=given.seed,
        saturated=saturated,
        at_rate=planner.at(rate, n_images) if rate < saturated.images_per_s else None,
        for_latency=None,
    )
    if given.p99_ms is not None:
        _report("searching for the number of replicas that keeps the latency")
        plan = replace(plan, for_latency=planner.replicas_for(given.rate, given.p99_ms, saturated.images_per_s))
    return plan, planner


def _load(model: str) -> Bundle:
    path = Path(model)
    if not path.is_dir() and (ZOO / model).is_dir():
        path = ZOO / model
    if not path.is_dir():
        known = ", ".join(sorted(folder.name for folder in ZOO.glob("*") if folder.is_dir())) or "none here"
        raise PlanError(f"--model {model}: neither a folder nor a network of {ZOO} ({known})")
    return load_bundle(path)


def _budget(given: argparse.Namespace, targets: Targets) -> float:
    """The requested budget in mflops per image."""
    if given.accuracy is not None:
        return targets.resolve("accuracy", given.accuracy).average_mflops
    text = str(given.budget).strip()
    number, unit = (text[:-1], text[-1]) if text[-1:] in {"%", "M"} else (text, "M")
    try:
        value = float(number)
    except ValueError:
        raise PlanError(
            f"--budget {text}: give a share of the full network, such as 40%, or MFLOPs per image, such as 24"
        ) from None
    target = targets.resolve("fraction", value / 100) if unit == "%" else targets.resolve("average_mflops", value)
    return target.average_mflops


def _n_images(given: argparse.Namespace) -> int:
    if given.seconds is None:
        return IMAGES
    n_images: float = given.seconds * given.rate / given.replicas  # may be too large for an int, even inf
    if not 1_000 <= n_images <= MOST_IMAGES:
        raise PlanError(
            f"--seconds {given.seconds:g}: {n_images:,.0f} images per replica; simulate 1,000 to {MOST_IMAGES:,}"
        )
    return round(n_images)


def _times(given: argparse.Namespace, bundle: Bundle, budget_mflops: float) -> StageTimes:
    if given.stage_times is not None:
        if given.save_stage_times is not None:
            raise PlanError("--stage-times and --save-stage-times: give one of them; only new measurements are saved")
        times = StageTimes.load(given.stage_times)
        require_stages(times, bundle.manifest.stages, given.stage_times)
        return times
    if given.save_stage_times is not None and not given.save_stage_times.absolute().parent.is_dir():
        raise PlanError(
            f"--save-stage-times {given.save_stage_times}: there is no folder {given.save_stage_times.parent}"
        )
    with Neighbours() as neighbours:
        times = measure(bundle, given.lanes, given.max_batch_rows, budget_mflops, tell=_report)
    if neighbours.share is not None and neighbours.share > BUSY:
        beside = f"beside other work that used {neighbours.share:.0%} of the cores"
        times = times.model_copy(update={"machine": f"{times.machine}, {beside}"})
        sys.stderr.write(f"warning: measured {beside}: an idle machine may answer more than this plan says\n")
    if given.save_stage_times is not None:
        try:
            times.save(given.save_stage_times)
        except OSError as error:
            raise PlanError(f"--save-stage-times {given.save_stage_times}: {error.strerror}") from None
    return times


def _report(text: str) -> None:
    sys.stderr.write(f"{text} ...\n")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _not_negative(text: str) -> float:
    value = _number(text)
    if not 0 <= value < inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def _count(text: str, most: int = MOST) -> int:
    value = _number(text)
    if not 1 <= value <= most or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to {most:,}")
    return int(value)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)
