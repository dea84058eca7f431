"""The precision in which a run computes: the recipe's, resolved for the device."""

from typing import Literal

import torch

from training.recipe import Numerics

Precision = Literal["fp32", "bf16"]


def precision_of(numerics: Numerics, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 if the device computes in it, fp32 if bf16 would be emulated, many times slower.

    Of CPUs, those with AVX-512 get bf16: it is fast with AMX or AVX512-BF16, and costs little without them.
    """
    if numerics.precision != "auto":
        return numerics.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Autocast of the forward pass to `precision`; losses and the boosted sum stay float32, see `models.boosting`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
