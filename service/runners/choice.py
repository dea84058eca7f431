"""Chooses the runner of a bundle: the one that the settings name, or the fastest on this machine."""

import gc
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from math import ceil
from typing import Literal

from models.bundle import Bundle
from models.onnx_weights import StageLoadError
from service.runners.base import FatalRunnerError, Runner, RunnerError
from service.runners.onnx import OnnxRunner
from service.runners.providers import Device, check_device, cuda_device_count, tensorrt_version
from service.runners.slotted import DEFAULT_LANES

RunnerName = Literal["auto", "onnx", "torch-cuda"]
Resize = Literal["auto", "host", "device"]
Candidates = Mapping[str, Callable[[], Runner]]
logger = logging.getLogger(__name__)

CANVAS = 16 / 7  # times the network's side: 512 for 224 pixels
CANVAS_STEP_PX = 16


def canvas_px(height_px: int, width_px: int) -> int:
    """The largest side of images to be scaled on the device. Larger ones are scaled on the host: most of their pixels
    would be sent only to be discarded, and every canvas of a batch has this size, however small its image."""
    return CANVAS_STEP_PX * ceil(CANVAS * max(height_px, width_px) / CANVAS_STEP_PX)


def wants_gpu(name: RunnerName, device: Device) -> bool:
    """Whether the settings ask for a GPU, present or not, or allow one that is present."""
    return name == "torch-cuda" or device in ("cuda", "tensorrt") or (device == "auto" and cuda_device_count() > 0)


def open_runner(
    bundle: Bundle,
    name: RunnerName = "auto",
    *,
    device: Device = "auto",
    n_lanes: int | None = None,
    max_rows: int = 32,
    max_in_flight_rows: int = 1024,
    compile_stages: bool = False,
    resize: Resize = "auto",
) -> Runner:
    """Open a bundle's stages.

    Args:
        name: `auto` is `onnx` without a GPU and for int8 stages; otherwise the runner that measures fastest.
        device: `auto` is the GPU if there is one and a runner can run on it, else the CPU.
        n_lanes: batches at once; by default one per core, on GPUs the runner's own default.
        max_rows: the largest batch.
        max_in_flight_rows: images in flight at once.
        compile_stages: see `open_torch_runner`.
        resize: with "host", no runner takes images of other sizes than the network's (see `base.canvas_px_of`).

    Raises:
        StageLoadError, RunnerError: the runner cannot be opened; the message names the cause and the fix.
    """
    if name == "torch-cuda":
        if device in ("cpu", "tensorrt"):
            raise RunnerError("the runner torch-cuda runs on CUDA: choose the device auto or cuda, or the runner onnx")
        if bundle.precision != "fp32":
            raise RunnerError("the runner torch-cuda has no int8 stages: choose the precision fp32, or the runner onnx")
    elif bundle.precision != "fp32" and device not in ("auto", "cpu"):
        raise RunnerError("int8 stages run on the CPU: choose the device cpu or auto, or the precision fp32")
    check_device(device)
    if name != "torch-cuda" and (device == "cpu" or bundle.precision != "fp32" or not cuda_device_count()):
        return OnnxRunner(bundle, max_rows, n_lanes)

    def open_torch() -> Runner:
        if importlib.util.find_spec("torch") is None:
            raise RunnerError(
                "the runner torch-cuda needs a CUDA build of torch, which is not installed: pip install torch, or "
                "choose the runner onnx or auto"
            )
        try:
            from service.runners.torch_cuda.runner import open_torch_runner
        except (ImportError, OSError) as error:  # a library of its own is missing, or is another version
            raise RunnerError(
                f"the runner torch-cuda needs torch, which is installed but cannot be loaded ({error}): reinstall it, "
                "or choose the runner onnx or auto"
            ) from error

        size = bundle.manifest.input
        return open_torch_runner(
            bundle,
            max_rows,
            max_in_flight_rows,
            n_lanes,
            compile_stages=compile_stages,
            canvas_px=0 if resize == "host" else canvas_px(size.height_px, size.width_px),
        )

    def open_onnx(on: Literal["cuda", "tensorrt"]) -> Runner:
        if importlib.util.find_spec("onnx") is None:
            raise RunnerError("ONNX Runtime on a GPU needs the package onnx, which is not installed: pip install onnx")
        from service.runners.onnx_device.runner import OnnxDeviceRunner

        return OnnxDeviceRunner(bundle, on, max_rows, max_in_flight_rows, n_lanes or DEFAULT_LANES)

    candidates: dict[str, Callable[[], Runner]] = {}
    if name == "torch-cuda" or (name == "auto" and device != "tensorrt" and importlib.util.find_spec("torch")):
        candidates["torch-cuda"] = open_torch
    if name != "torch-cuda" and device != "tensorrt":
        candidates["onnx on cuda"] = lambda: open_onnx("cuda")
    if name != "torch-cuda" and (device == "tensorrt" or (device == "auto" and tensorrt_version())):
        candidates["onnx on tensorrt"] = lambda: open_onnx("tensorrt")
    if len(candidates) == 1 and (device != "auto" or name == "torch-cuda"):
        return next(iter(candidates.values()))()
    try:
        return fastest(candidates)
    except RunnerError as error:
        if device != "auto" or isinstance(error, FatalRunnerError):
            raise
        logger.warning("stages run on the CPU, although there is a GPU: %s", error)
        return OnnxRunner(bundle, max_rows, n_lanes)


def fastest(candidates: Candidates) -> Runner:
    """Warm up every candidate, and return the one whose full batches take the least time per image, over all stages.

    Candidates that cannot be opened or warmed up are left out, with a warning.

    Raises:
        FatalRunnerError: a candidate lost the device, so no other can be tried in this process.
        RunnerError: no candidate can run.
    """
    best: tuple[float, str, Runner] | None = None
    failures = []
    for name, open_candidate in candidates.items():
        runner: Runner | None = None  # lets go of the previous candidate, unless it is the best: its memory is needed
        try:
            _return_memory()
            runner = open_candidate()
            image_s = sum(seconds[max(seconds)] / max(seconds) for seconds in runner.warm_up())
        except FatalRunnerError:
            raise
        except Exception as error:  # of any type, from libraries; another candidate may still serve
            is_known = isinstance(error, (RunnerError, StageLoadError))
            logger.warning("the runner %s is left out: %s", name, error, exc_info=not is_known)
            failures.append(f"{name}: {error}")
            continue
        logger.info("the runner %s takes %.3f ms per image in full batches", name, 1e3 * image_s)
        if best is None or image_s < best[0]:
            best = (image_s, name, runner)
    if best is None:
        raise RunnerError(f"no runner can run on this machine; {'; '.join(failures)}")
    logger.info("chosen: the runner %s", best[1])
    runner = None
    _return_memory()
    return best[2]


def _return_memory() -> None:
    """Return the memory of candidates that were let go to the device, where other libraries look for it. Torch keeps
    what is freed for itself; its networks are freed only by the garbage collector, as their parts form cycles."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
