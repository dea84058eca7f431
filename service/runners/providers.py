"""ONNX Runtime's execution providers: whether they load, their options, and where TensorRT's engines are cached.

ONNX Runtime's GPU package lists CUDA and TensorRT on every machine. If it cannot load the one asked for, it runs on the
CPU and only logs a line. So the driver is asked before a session is opened, and the session what it runs on after.
"""

import contextlib
import ctypes
import functools
import importlib.util
import io
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnxruntime as ort

from models.bundle import Bundle
from models.manifest import StageInfo
from service.runners.base import RunnerError

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
TENSORRT_LIBRARY, TENSORRT_PARSER = "libnvinfer.so.10", "libnvonnxparser.so.10"  # its provider links to these

logger = logging.getLogger(__name__)


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def cuda_device_count() -> int:
    """The number of CUDA devices according to the driver; 0 without a driver."""
    driver, count = _driver(), ctypes.c_int(0)
    return count.value if driver is not None and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def cuda_device_name() -> str:
    """The driver's name for the first device."""
    driver, name = _driver(), ctypes.create_string_buffer(256)
    if driver is None or driver.cuDeviceGetName(name, len(name), 0) != 0:
        return "unknown"
    return name.value.decode(errors="replace")


@functools.cache
def tensorrt_version() -> int | None:
    """The version number that the TensorRT library reports; None if it or its parser cannot be loaded."""
    package = importlib.util.find_spec("tensorrt_libs")
    folders = package.submodule_search_locations or () if package else ()
    for folder in (*folders, ""):  # "": where the dynamic linker looks
        try:
            library = ctypes.CDLL(str(Path(folder, TENSORRT_LIBRARY)))
            ctypes.CDLL(str(Path(folder, TENSORRT_PARSER)))
        except OSError:
            continue
        return int(library.getInferLibVersion())
    return None


@functools.cache
def load_libraries() -> None:
    """Load CUDA, cuDNN and TensorRT from their wheels, if installed: the dynamic linker does not look there."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ort.preload_dlls(directory="")
    tensorrt_version()
    if said.getvalue():
        logger.info("ONNX Runtime's libraries: %s", said.getvalue().strip())


# Errors after which, CUDA says, "the process must be terminated and relaunched" (CUDA Runtime API, cudaError_t).
LOST = frozenset({214, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999})


def is_lost(error: Exception) -> bool:
    """Whether an error of ONNX Runtime's CUDA provider means that the device is lost to this process."""
    match = re.search(r"CUDA failure (\d+)", str(error))
    return match is not None and int(match[1]) in LOST


def why_not_loaded(provider: str) -> str:
    """Why ONNX Runtime cannot load a provider, in the dynamic linker's words."""
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / LIBRARIES[provider]))
    except OSError as error:
        return str(error)
    return "its log says why"


def check_device(device: Device) -> None:
    """Check that the device asked for can be used on this machine.

    Raises:
        RunnerError: it cannot; the message names the cause and the fix.
    """
    if device in ("auto", "cpu"):
        return
    provider = CUDA if device == "cuda" else TENSORRT
    if provider not in ort.get_available_providers():
        cause, fix = f"this ONNX Runtime is built without {provider}", "install onnxruntime-gpu"
    elif not cuda_device_count():
        cause, fix = "the driver reports no device", "install a driver that knows CUDA 13"
    else:
        return
    raise RunnerError(f"the device {device} was asked for, but {cause}: choose the device cpu or auto, or {fix}")


def check_loaded(session: ort.InferenceSession, provider: str) -> None:
    """Check that a session runs on the provider that was asked for.

    Raises:
        RunnerError: it fell back to another provider.
    """
    if provider in session.get_providers():
        return
    fix = "pip install 'onnxruntime-gpu[cuda,cudnn]'" if provider == CUDA else "pip install 'tensorrt-cu13<11'"
    raise RunnerError(
        f"ONNX Runtime cannot load {provider} ({why_not_loaded(provider)}): {fix}, or choose the device cpu or auto"
    )


def engine_cache(bundle: Bundle, max_rows: int) -> Path:
    """Return the folder in which TensorRT caches the engines of a bundle; create it if needed.

    An engine is valid for one network, one range of batch sizes, one version of either library and one model of GPU.
    The folder's name has all of these, so that no engine is mistaken for another.

    Raises:
        RunnerError: the folder cannot be created or written to.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = (bundle.manifest.version, "fp16", max_rows, f"ort-{ort.__version__}", f"trt-{tensorrt_version()}")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(map(str, (*key, cuda_device_name()))))
    folder = root / "exitserve" / "tensorrt" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise RunnerError(
            f"TensorRT's engines cannot be cached in {folder} ({error.strerror}): set XDG_CACHE_HOME to a folder that "
            "can be written to, or choose the device cuda"
        ) from error
    return folder


def cuda_options(graphs: bool) -> dict[str, str]:
    # Each stage has a memory arena of its own, so let it grow by what is needed rather than to a power of two.
    return {"arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": "1" if graphs else "0"}


def tensorrt_options(stage: StageInfo, max_rows: int, folder: Path, excluded: Sequence[str]) -> dict[str, str]:
    """Options for float16 engines of 1 to `max_rows` rows, tuned for the latter; `excluded` operators run on CUDA."""

    def shapes(n_rows: int) -> str:
        return ",".join(f"{value.name}:{'x'.join(map(str, (n_rows, *value.shape)))}" for value in stage.inputs)

    return {
        "trt_fp16_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_op_types_to_exclude": ",".join(excluded),
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": shapes(max_rows),
        "trt_profile_max_shapes": shapes(max_rows),
    }
