"""Which runner runs a bundle: the one that was asked for, or the fastest on this machine."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Literal

from models.bundle import Bundle
from models.onnx_weights import StageLoadError
from service.runners.base import Runner, RunnerError
from service.runners.onnx import Device, OnnxRunner, cuda_device_count

RunnerName = Literal["auto", "onnx", "torch-cuda"]
logger = logging.getLogger(__name__)


def open_runner(
    bundle: Bundle,
    name: RunnerName = "auto",
    *,
    device: Device = "auto",
    n_lanes: int | None = None,
    max_rows: int = 32,
    max_in_flight_rows: int = 1024,
) -> Runner:
    """Open a bundle's stages.

    Args:
        name: `auto` is `onnx` at once where there is no GPU to use or no torch, and for int8 stages; else whichever
            measures faster.
        device, n_lanes, max_rows: see `OnnxRunner`.
        max_in_flight_rows: images in work at once.

    Raises:
        StageLoadError, RunnerError: the runner cannot be had; the message says why.
    """

    def open_onnx() -> Runner:
        return OnnxRunner(bundle, max_rows, n_lanes, device)

    def open_torch() -> Runner:
        if importlib.util.find_spec("torch") is None:
            raise RunnerError(
                "the runner torch-cuda needs a CUDA build of torch, which is not installed: pip install torch, or "
                "choose the runner onnx or auto"
            )
        from service.runners.torch_cuda.runner import open_torch_runner

        return open_torch_runner(bundle, max_rows, max_in_flight_rows, n_lanes)

    if name == "torch-cuda":
        if device == "cpu":
            raise RunnerError("the runner torch-cuda runs on GPUs: choose the device auto or cuda, or the runner onnx")
        if bundle.precision != "fp32":
            raise RunnerError("the runner torch-cuda has no int8 stages: choose the precision fp32, or the runner onnx")
        return open_torch()
    is_onnx = name == "onnx" or device == "cpu" or bundle.precision != "fp32"
    if is_onnx or not cuda_device_count() or importlib.util.find_spec("torch") is None:
        return open_onnx()
    return fastest({"torch-cuda": open_torch, "onnx": open_onnx})


def fastest(candidates: Mapping[str, Callable[[], Runner]]) -> Runner:
    """Warm every candidate up, and return the one whose full batches take the least time an image through all stages.

    Those that cannot be opened or warmed up are left out, with a warning.

    Raises:
        RunnerError: none can run.
    """
    best: tuple[float, str, Runner] | None = None
    failures = []
    for name, open_candidate in candidates.items():
        try:
            runner = open_candidate()
            image_s = sum(seconds[max(seconds)] / max(seconds) for seconds in runner.warm_up())
        except (RunnerError, StageLoadError) as error:
            logger.warning("the runner %s is left out: %s", name, error)
            failures.append(f"{name}: {error}")
            continue
        logger.info("the runner %s takes %.3f ms an image in full batches", name, 1e3 * image_s)
        if best is None or image_s < best[0]:
            best = (image_s, name, runner)
        del runner  # the slower one's memory is needed
    if best is None:
        raise RunnerError(f"no runner can run on this machine; {'; '.join(failures)}")
    logger.info("chosen: the runner %s", best[1])
    return best[2]
