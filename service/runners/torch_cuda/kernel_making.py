"""Compiles the custom kernels when the runner starts, and checks each against torch on random numbers before use."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from service.runners.limits import is_out_of_memory
from service.runners.torch_cuda.kernel_sources import JUDGED, SOURCES
from service.runners.torch_cuda.kernels import Compile, Kernels, Launch, Ways, centred
from service.runners.torch_cuda.scoring import N_NUMBERS, judge_by_torch

N_JUDGED = 16  # rows to check: they are independent

logger = logging.getLogger(__name__)


def compiler_for(device: torch.device) -> Compile | None:
    """The compiler of kernels for a device; None without a GPU."""
    return _by_nvrtc if device.type == "cuda" else None


def _by_nvrtc(source: str, name: str) -> Launch:
    """Compile by `torch.cuda._compile_kernel`, also without a CUDA toolkit.

    Torch insists on the folder of a toolkit's headers, which its wheels lack. The kernels include none.
    """
    from torch.utils import cpp_extension  # takes a while; torch imports it here, too

    home = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = home or str(Path(torch.__file__).parent)
    try:
        launch: Launch = torch.cuda._compile_kernel(source, name)
    finally:
        cpp_extension.CUDA_HOME = home
    return launch


def make_kernels(device: torch.device, ways: Ways) -> Kernels:
    """Make and check the kernels that `ways` asks for. Those that fail are left out, with a warning each.

    Raises:
        RuntimeError: the device is out of memory.
    """
    compile_kernel = compiler_for(device)
    made: dict[str, Launch] = {}
    for name in SOURCES if compile_kernel else ():
        if not getattr(ways, name):
            continue
        assert compile_kernel is not None
        try:
            launch = compile_kernel(SOURCES[name], name)
            CHECKS[name](Kernels({name: launch}), device)
        except Exception as error:  # of any type: NVRTC is missing or refuses, or results differ
            if is_out_of_memory(error):  # torch's own kernels would have none either
                raise
            logger.warning("torch does the work of the kernel %s, which is not used: %s", name, error)
        else:
            made[name] = launch
    return Kernels(made, compile_kernel)


def _require(found: Tensor, expected: Tensor, what: str, tolerance: float = 0.0) -> None:
    """Raise RuntimeError unless two tensors are equal within a tolerance, and a map is channels-last."""
    laid_out = found.ndim != 4 or found.is_contiguous(memory_format=torch.channels_last)
    if (
        not laid_out
        or found.shape != expected.shape
        or not torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    ):
        raise RuntimeError(f"its results differ for {what}")


def _map(device: torch.device, *shape: int) -> Tensor:
    x = torch.randn(shape, device=device).to(torch.float16)
    x.view(-1)[:: max(1, x.numel() // 3)] = torch.nan
    return x.contiguous(memory_format=torch.channels_last)


def _check_bias_relu(kernels: Kernels, device: torch.device) -> None:
    for shape in ((3, 8, 5, 7), (2, 48, 9, 9), (1, 136, 1, 1)):
        x, bias = _map(device, *shape), torch.randn((1, shape[1], 1, 1), device=device).to(torch.float16)
        expected = torch.relu(x + bias)
        _require(kernels.bias_relu(x, bias), expected, f"maps {shape}", 1e-3)


def _check_concat(kernels: Kernels, device: torch.device) -> None:
    for rows, side, widths in ((3, 5, (8, 16)), (1, 1, (24, 8, 40)), (2, 33, (16, 8, 8))):
        maps = [_map(device, rows, width, side, side) for width in widths]
        expected = torch.cat(maps, 1).contiguous(memory_format=torch.channels_last)
        what = f"{rows} maps of {widths} channels"
        _require(kernels.concat(maps), expected, what)
        first = kernels.concat(maps[:1], room=sum(widths))
        begun = first.contiguous(memory_format=torch.channels_last)
        _require(begun, maps[0], f"{what}, the first with room")
        _require(kernels.append(first, maps[1:]), expected, f"{what}, appended")


def _check_move(kernels: Kernels, device: torch.device) -> None:
    stores = [torch.randn((9, *shape), device=device).to(torch.float16) for shape in ((4, 4, 8), (3, 5, 24), (16,))]
    for n_stores in (3, 1):
        slots = torch.tensor([7, 2, 3, 5, 8], device=device)
        some = stores[:n_stores]
        rows = [torch.empty_like(store[:5]) for store in some]
        kernels.move(slots, list(zip(some, rows, strict=True)), out=True)
        for store, loose in zip(some, rows, strict=True):
            _require(loose.flatten(1), store.index_select(0, slots).flatten(1), "rows out of slots")
        expected = [store.index_copy(0, slots, loose + 1) for store, loose in zip(some, rows, strict=True)]
        kernels.move(slots, [(store, loose + 1) for store, loose in zip(some, rows, strict=True)], out=False)
        for store, wanted in zip(some, expected, strict=True):
            _require(store.flatten(1), wanted.flatten(1), "rows into slots")


def _check_max_pool(kernels: Kernels, device: torch.device) -> None:
    for shape, how in (((2, 16, 13, 18), (3, 2, 1)), ((1, 8, 8, 8), (2, 2, 0)), ((3, 32, 7, 7), (3, 1, 1))):
        x = _map(device, *shape)
        expected = F.max_pool2d(x, *how).contiguous(memory_format=torch.channels_last)
        _require(kernels.max_pool(x, *how), expected, f"maps {shape}")


def _check_centre(kernels: Kernels, device: torch.device) -> None:
    levels = torch.randint(0, 256, (3,), device=device).float()
    for shape in ((3, 4, 4, 3), (2, 30, 46, 3)):
        images = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
        for n_copies in (1, 2):
            expected = centred(images, levels, n_copies, torch.float16)
            _require(kernels.centre(images, levels, n_copies), expected, f"images {shape}")


def _check_judge(kernels: Kernels, device: torch.device) -> None:
    for n_classes in (2, 31, 100, 1000):
        logits = torch.randn((N_JUDGED, n_classes), device=device)
        logits *= torch.logspace(-2, 2, N_JUDGED, device=device)[:, None]
        logits[0, 0], logits[1], logits[2, 1], logits[3, -1] = torch.inf, torch.nan, -torch.inf, torch.nan
        for score in JUDGED:
            found = torch.zeros((N_JUDGED, N_NUMBERS), dtype=torch.float64, device=device)
            expected = torch.zeros_like(found)
            kernels.judge(logits, score, found)
            judge_by_torch(logits, score, expected)
            found[1, 0] = expected[1, 0] = 0.0  # all logits are NaN: torch may take any class
            _require(found, expected, f"the score {score} of {n_classes} classes", 1e-9)


CHECKS: dict[str, Callable[[Kernels, torch.device], None]] = {
    "bias_relu": _check_bias_relu,
    "concat": _check_concat,
    "move": _check_move,
    "max_pool": _check_max_pool,
    "centre": _check_centre,
    "judge": _check_judge,
}
"""Each raises RuntimeError if the kernel and torch disagree."""
