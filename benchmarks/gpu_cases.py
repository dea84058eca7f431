"""Inputs of the GPU benchmark: networks, SYNTHETIC images, and reference answers in float32, computed eagerly."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.bundle import Bundle, load_bundle
from models.cost import measure_cost
from models.exits import SCORES, take_exits
from models.frontier import Frontier, build_frontier
from models.registry import build_network
from models.scores import HeadScore, score_exits
from service.budget.controller import BudgetController
from service.budget.ledger import window_for
from service.engine.engine import Engine
from service.engine.observer import Observer
from service.engine.scheduler import Scheduler
from service.runners.blocks import RowState
from service.runners.slotted import SlotRunner
from service.runners.torch_cuda.device import Device
from service.runners.torch_cuda.network import cut, load_network
from service.runners.torch_cuda.runner import TorchCudaRunner

ZOO = Path(__file__).resolve().parents[1] / "models" / "zoo"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TINY = {
    **{"config": "C-batch-4", "n_classes": 10, "n_blocks": 4, "base": 1, "step": 1, "n_channels": 4, "growth_rate": 4},
    **{"growth_factors": [1, 1, 2], "bottleneck": False, "bottleneck_factors": [1, 1, 2], "temperatures": 0.5},
}
WANTED_SAME = 0.999
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """Device and amounts of a measurement."""

    device: Device
    dtype: torch.dtype
    max_rows: int
    n_images: int
    in_flight: int
    whole_rows: Sequence[int]  # batch sizes in which the whole network is measured
    seconds: float  # of each round that measures a rate
    repeats: int  # runs of each program that is timed
    n_alone: int  # images sent one at a time
    n_lanes: int = 2
    tensorrt: bool = False
    images: Path | None = None  # .npz with `images` to use instead of synthetic ones
    until_s: float = inf  # `perf_counter` time after which nothing long is begun


@dataclass(frozen=True)
class Case:
    """A network, images of its size, their reference logits and the frontier calibrated on them."""

    name: str
    network: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    score: str
    images: Images
    logits: list[NDArray[np.float32]]  # the reference: float32, eager, [exits][images, classes]
    costs_mflops: list[float]
    stage_macs: list[int]
    frontier: Frontier
    bundle: Bundle | None = None  # the same network as ONNX stages
    kind: str = "SYNTHETIC images"

    def runner(
        self, plan: Plan, network: nn.Module | None = None, full_only: bool = False, **options: Any
    ) -> TorchCudaRunner:
        """A runner after warm-up; `full_only`: prepared for full batches only."""
        given: dict[str, Any] = {"device": plan.device, "dtype": plan.dtype, "n_lanes": plan.n_lanes}
        given |= {"max_rows": plan.max_rows, "max_in_flight_rows": plan.in_flight} | options
        network = network or self.network
        runner = TorchCudaRunner(network, self.images.shape[1:], self.mean, self.std, self.score, **given)
        if full_only:
            del runner.buckets[:-1]
        runner.warm_up(inf)
        return runner

    def engine(self, runner: SlotRunner[Any], policy: str, plan: Plan, observer: Observer | None = None) -> Engine:
        full, burst_images = self.costs_mflops[-1], max(32.0, 2.0 * runner.max_rows)
        window = window_for(plan.in_flight)
        budget = BudgetController(self.frontier, self.costs_mflops, full, burst_images, window_answers=window)
        scheduler: Scheduler[Any] = Scheduler(runner.n_stages, runner.max_rows, policy=policy)
        names = [str(i) for i in range(self.logits[0].shape[1])]
        score = HeadScore(SCORES[self.score])
        # Without graphs, a lane's first batch of each size takes seconds, as cuDNN caches its plans by thread.
        return Engine(runner, budget, scheduler, score, names, plan.in_flight, observer=observer, hang_s=120.0)


def make_images(n_images: int, side_px: int) -> Images:
    """Coarse and fine noise, uint8 [n_images, side_px, side_px, 3]."""
    rng = np.random.default_rng(0)
    images = np.empty((n_images, side_px, side_px, 3), np.uint8)
    for image in images:
        coarse = rng.standard_normal((4, 4, 3), np.float32).repeat(side_px // 4, axis=0).repeat(side_px // 4, axis=1)
        image[:] = np.clip(128 + 45 * coarse + 25 * rng.standard_normal(image.shape, np.float32), 0, 255)
    return images


@torch.no_grad()
def random_network(arguments: dict[str, Any], images: Images, device: torch.device) -> nn.Module:
    """A network with random weights, scaled so that its maps do not vanish and its logits differ."""
    torch.manual_seed(0)
    network = build_network("msdnet", arguments).to(device)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one pass sets the statistics
        elif isinstance(module, nn.Linear):
            module.weight.mul_(10.0)
    pixels = torch.from_numpy(images[:16]).to(device).permute(0, 3, 1, 2).float() / 255
    network.train()((pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None])
    return network.cpu().eval()


def make_case(
    name: str, network: nn.Module, mean: Sequence[float], std: Sequence[float], score: str, images: Images, plan: Plan
) -> Case:
    logits = reference(network, mean, std, images, plan.device.kind)
    cost = measure_cost(network, images.shape[1])
    costs_mflops = [executed / 1e6 for executed in cost.executed]
    scores = score_exits(HeadScore(SCORES[score]), logits)
    # Each exit is right for more images than the one before, so the frontier reaches from the first exit to the last.
    luck = np.random.default_rng(1).random((len(images), 1))
    correct = luck < np.linspace(0.5, 0.9, len(logits))
    stage_macs = [b - a for a, b in pairwise([0, *cost.executed_macs])]
    frontier = build_frontier(scores, correct, costs_mflops)
    return Case(name, network, mean, std, score, images, logits, costs_mflops, stage_macs, frontier)


def make_tiny(plan: Plan) -> Case:
    images = make_images(plan.n_images, 32)
    network = random_network(TINY, images, plan.device.kind)
    return make_case("tiny, random weights", network, MEAN, STD, "logit_margin", images, plan)


def make_cifar(plan: Plan) -> Case:
    bundle = load_bundle(ZOO / "cifar100-msdnet")
    of, images = bundle.manifest.input, make_images(plan.n_images, 32)
    if plan.images is not None:
        images = np.load(plan.images)["images"][: plan.n_images]
    score = bundle.manifest.score if bundle.manifest.score in SCORES else "logit_margin"
    network, name = load_network(bundle), "CIFAR size: cifar100-msdnet"
    case = replace(make_case(name, network, of.mean, of.std, score, images, plan), bundle=bundle)
    if plan.images is None or score != bundle.manifest.score:
        return case
    return replace(case, frontier=bundle.frontier(), kind=f"images of {plan.images.name}, exits as calibrated")


def make_imagenet(plan: Plan) -> Case:
    images = make_images(plan.n_images, 224)
    network = random_network({"config": "I-5", "temperatures": [0.5]}, images, plan.device.kind)
    return make_case("ImageNet size: MSDNet I-5, random weights", network, MEAN, STD, "logit_margin", images, plan)


@dataclass(frozen=True)
class Network:
    """The function that makes a case, and the amounts of its plan."""

    make: Callable[[Plan], Case]
    amounts: Mapping[str, Any]


# Small networks need batches of hundreds to fill a GPU, and of a thousand to hide Python's time per batch. The images
# in flight suffice for two batches per lane and full queues before the stages.
REAL = {"seconds": 0.6, "repeats": 20, "n_alone": 200}
NETWORKS = {
    "cifar": Network(
        make_cifar,
        {"max_rows": 1024, "n_images": 10_000, "in_flight": 8192, "whole_rows": (256, 512, 1024)} | REAL,
    ),
    "imagenet": Network(
        make_imagenet,
        {"max_rows": 256, "n_images": 1024, "in_flight": 2048, "whole_rows": (128, 256, 512)} | REAL,
    ),
    "tiny": Network(
        make_tiny,
        {"max_rows": 4, "n_images": 32, "in_flight": 16, "whole_rows": (2, 4), "seconds": 0.05}
        | {"repeats": 2, "n_alone": 30},  # more than the burst covers
    ),
}


@torch.inference_mode()
def reference(
    network: nn.Module, mean: Sequence[float], std: Sequence[float], images: Images, device: torch.device
) -> list[NDArray[np.float32]]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    stages = [stage.to(device) for stage in cut(network, images.shape[1:], mean, std)]
    logits: list[list[Tensor]] = [[] for _ in stages]
    for start in range(0, len(images), 64):
        state = {"images": torch.from_numpy(images[start : start + 64]).to(device)}
        for stage, at_exit in zip(stages, logits, strict=True):
            state.update(zip(stage.outputs, stage(*(state[name] for name in stage.inputs)), strict=True))
            at_exit.append(state[stage.outputs[0]].float().cpu())
    return [torch.cat(at_exit).numpy() for at_exit in logits]


def check_answers(case: Case, runner: SlotRunner[Any]) -> dict[str, Any]:
    """Run all images through all stages and compare labels, exits, logits and scores with the reference."""
    found: list[list[NDArray[np.float32]]] = [[] for _ in case.logits]
    for start in range(0, len(case.images), runner.max_rows):
        rows: Sequence[RowState] = [runner.first_state(image) for image in case.images[start : start + runner.max_rows]]
        for stage, at_exit in enumerate(found):
            output = runner.run(stage, rows)
            at_exit.append(output.logits)
            rows = output.states
    logits = [np.concatenate(at_exit) for at_exit in found]
    score = HeadScore(SCORES[case.score])
    ours, theirs = (score_exits(score, x) for x in (logits, case.logits))
    ours_lead, theirs_lead = (np.stack([x.argmax(axis=1) for x in each], axis=1) for each in (logits, case.logits))
    rows_of = np.arange(len(theirs))

    def thresholds_at(fraction: float) -> NDArray[np.float64]:
        return np.array(case.frontier.at_cost(fraction * case.costs_mflops[-1]).thresholds)

    def same_at(fraction: float) -> NDArray[np.bool_]:
        here, there = (take_exits(scores, thresholds_at(fraction)) for scores in (ours, theirs))
        same: NDArray[np.bool_] = (here == there) & (ours_lead[rows_of, here] == theirs_lead[rows_of, there])
        return same

    thresholds, same = thresholds_at(0.4), same_at(0.4)
    exits = take_exits(theirs, thresholds)
    errors = np.array([np.abs(a - b).max(axis=1) for a, b in zip(logits, case.logits, strict=True)]).T
    top = np.sort(np.stack(case.logits, axis=1), axis=2)
    margin = (top[:, :, -1] - top[:, :, -2])[rows_of, exits]
    score_error = np.abs(ours - theirs).max(axis=1)
    passed = np.arange(theirs.shape[1])[None, :] <= exits[:, None]
    distance = np.where(passed & np.isfinite(thresholds), np.abs(theirs - thresholds), inf).min(axis=1)
    # The margin to another class or exit is within the error of this image: rounding decides.
    close_call = (margin < 2 * errors.max(axis=1)) | (distance < score_error)
    return {
        "same_label_and_exit": float(same.mean()),
        "same_at_other_budgets": {f"{fraction:.0%}": float(same_at(fraction).mean()) for fraction in (0.25, 0.6)},
        "wanted": WANTED_SAME,
        "met": bool(same.mean() >= WANTED_SAME),
        "close_calls": float(close_call.mean()),  # by arithmetic, those that differ are among them
        "worst_logit_error_of_largest": float(errors.max() / max(np.abs(x).max() for x in case.logits)),
        "median_score_error": float(np.median(score_error)),
    }
