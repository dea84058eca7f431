"""A convolution, its bias and its ReLU: three kernels where torch runs them one by one, two here, or one by cuDNN.

Small networks are bound by how many kernels they launch, also in a graph. Two are always right, and made by NVRTC,
which comes with torch. One is cuDNN's affair: it may take long to build and be slower, so it is tried and measured.
"""

import copy
import logging
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.staging import Stage

BiasRelu = Callable[[Tensor, Tensor], Tensor]
"""ReLU of a map [rows, channels, height, width] and a bias [1, channels, 1, 1]."""

# What is no number stays none, as with torch's own ReLU.
CODE = "template <typename T> T bias_relu(T x, T bias) { T sum = x + bias; return sum < T(0) ? T(0) : sum; }"

logger = logging.getLogger(__name__)


class ConvRelu(nn.Module):
    """A convolution with a bias, and the ReLU after it.

    Args:
        conv: whose weights and bias it has from now on.
        bias_relu: one kernel for both; None runs torch's own, one after the other.
    """

    def __init__(self, conv: nn.Conv2d, bias_relu: BiasRelu | None) -> None:
        super().__init__()
        self.conv, self.by_cudnn = conv, False
        self._bias_relu = bias_relu

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        assert conv.bias is not None
        assert not isinstance(conv.padding, str)
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        if self.by_cudnn:
            return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *geometry)
        if self._bias_relu is None or torch.compiler.is_compiling():  # a compiler joins them its own way
            return torch.relu(conv(x))
        return self._bias_relu(F.conv2d(x, conv.weight, None, *geometry), conv.bias[None, :, None, None])


def can_join(conv: nn.Conv2d) -> bool:
    return conv.bias is not None and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def make_bias_relu(device: torch.device, dtype: torch.dtype) -> BiasRelu | None:
    """Make the kernel, if there is a GPU and it computes there what it should."""
    if device.type != "cuda":
        return None
    try:
        made = torch.cuda.jiterator._create_jit_fn(CODE)
        x, bias = torch.randn((2, 6, 5, 5), dtype=dtype, device=device), torch.randn((1, 6, 1, 1), device=device)
        x, bias = x.to(memory_format=torch.channels_last), bias.to(dtype)
        found, expected = made(x, bias), torch.relu(x + bias)
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2) or found.stride() != expected.stride():
            raise RuntimeError("it computes something else")
    except Exception as error:  # of many kinds: NVRTC is missing, or refuses
        logger.warning("bias and ReLU run as two kernels, one cannot be made: %s", error)
        return None
    return cast(BiasRelu, made)


def by_cudnn(stage: Stage) -> Stage:
    """Return the same stage, whose convolutions are joined with bias and ReLU by cuDNN."""
    joined = copy.deepcopy(stage)
    for module in joined.modules():
        if isinstance(module, ConvRelu):
            module.by_cudnn = True
    return joined
