"""Chooses the precision at which a bundle is served."""

import logging
import time
from typing import Literal

import numpy as np

from models.bundle import Bundle
from service.runners.choice import RunnerName, wants_gpu
from service.runners.onnx import OnnxRunner
from service.runners.providers import Device

Asked = Literal["auto", "fp32", "int8"]
N_ROWS = 8
N_ROUNDS = 5
LEAST_GAIN = 1.1  # below it, the noise of a busy machine would decide

logger = logging.getLogger(__name__)


def at_precision(bundle: Bundle, asked: Asked, runner: RunnerName, device: Device) -> Bundle:
    """Return the bundle at the precision to serve.

    `auto` measures for a second or two, and takes int8 if the bundle has it and it is clearly faster on this machine.
    int8 is for CPUs: if `runner` and `device` ask for a GPU, or allow one that is there, `auto` is fp32. int8 answers a
    few images in a hundred differently, so with `auto`, servers on different machines may answer differently.

    Raises:
        BundleError: int8 is asked for, but the bundle has none.
        StageLoadError, RunnerError: a stage cannot be opened or run.
    """
    if asked != "auto":
        return bundle.at(asked)
    if bundle.int8 is None or wants_gpu(runner, device):
        logger.info("precision fp32: %s", "the bundle has no other" if bundle.int8 is None else "int8 is for CPUs")
        return bundle
    fp32_s, int8_s = _seconds(bundle, bundle.int8)
    taken = bundle.int8 if fp32_s > LEAST_GAIN * int8_s else bundle
    logger.info("precision %s: int8 is %.2f times as fast as fp32 here", taken.precision, fp32_s / int8_s)
    return taken


def _seconds(*bundles: Bundle) -> list[float]:
    """Seconds for a small batch through all stages of each bundle, measured in turns so that load hits all alike."""
    runners = [OnnxRunner(bundle, N_ROWS, n_lanes=1) for bundle in bundles]
    best = [float("inf")] * len(runners)
    for _ in range(N_ROUNDS):
        for i, runner in enumerate(runners):
            best[i] = min(best[i], _pass_s(runner))
    return best


def _pass_s(runner: OnnxRunner) -> float:
    image = runner.stages[0].inputs[0]
    rows = [runner.first_state(np.zeros(image.shape, image.dtype)) for _ in range(N_ROWS)]
    started = time.perf_counter()
    for stage in range(runner.n_stages):
        rows = runner.run(stage, rows).states
    return time.perf_counter() - started
