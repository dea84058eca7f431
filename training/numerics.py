"""In what arithmetic a run computes: what its recipe asks for, on the device at hand."""

from typing import Literal

import torch

from training.recipe import Numerics

Precision = Literal["fp32", "bf16"]


def precision_of(numerics: Numerics, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 where the device computes in it, fp32 where it would be emulated, many times slower.

    Among CPUs, those with AVX-512 count as able (AMX or AVX512-BF16 make it fast, and without them it costs little).
    """
    if numerics.precision != "auto":
        return numerics.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The forward pass in `precision`; losses and the boosted sum stay float32, see `models.boosting`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
