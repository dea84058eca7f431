"""A convolution, its bias and its ReLU: one kernel by cuBLAS or cuDNN, or two; torch alone runs three.

One of 1 x 1 pixels is a matrix product, which cuBLAS joins with both, needs no search, and is as fast as cuDNN. One of
few channels may be faster by a kernel of our own (`small_conv`), which is timed beside cuDNN's.

cuDNN's own joining is as fast as its convolution, if it may try all its algorithms: without that it picks slow ones. So
it is taken for the batch sizes for which there was time to try (`Cuda.searching`), if it is right there. Two kernels
are always right, and made by NVRTC, which comes with torch.
"""

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.staging import Stage

BiasRelu = Callable[[Tensor, Tensor], Tensor]
"""ReLU of a map [rows, channels, height, width] and a bias [1, channels, 1, 1]; the map may be overwritten."""

# What is no number stays none, as with torch's own ReLU.
CODE = "template <typename T> T bias_relu(T x, T bias) { T sum = x + bias; return sum < T(0) ? T(0) : sum; }"
SAME = 0.01  # of the largest value: half precision, summed up in another order
ALIGNED = 8  # channels, as products want them
TIMED_RUNS = 10
SLEEP_CYCLES = 4_000_000  # some 2 ms, in which these are put on the stream
CHECKED_ROWS = 4  # at both ends of a batch

logger = logging.getLogger(__name__)


class SmallKernel(Protocol):
    """See `small_conv.SmallConv`."""

    def takes(self, x: Tensor) -> bool: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class ConvRelu(nn.Module):
    """A convolution with a bias, and the ReLU after it.

    Args:
        conv: whose weights and bias it has from now on.
        bias_relu: one kernel for both; None runs torch's own, one after the other.
        fuse: whether cuDNN's joining is tried.
        multiply: whether it is a matrix product where it can be one.
    """

    def __init__(self, conv: nn.Conv2d, bias_relu: BiasRelu | None, fuse: bool = False, multiply: bool = False) -> None:
        super().__init__()
        self.conv, self.by_cudnn = conv, False
        self._bias_relu, self._fuse, self._multiply = bias_relu, fuse, multiply
        self.fused: dict[tuple[int, ...], bool] = {}
        """By the input's shape: whether cuDNN's joining was tried and is right."""
        self._adds_zeros = False
        self.small: SmallKernel | None = None
        self.small_wins: dict[tuple[int, ...], bool] = {}
        """By the input's shape: whether it was faster than the rest."""

    def around(self, conv: nn.Conv2d) -> "ConvRelu":
        """The same of another convolution."""
        return ConvRelu(conv, self._bias_relu, self._fuse, self._multiply)

    @property
    def is_product(self) -> bool:
        conv = self.conv
        wide = conv.in_channels % ALIGNED == 0 and conv.out_channels % ALIGNED == 0
        alone = conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
        return self._multiply and wide and alone

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if torch.compiler.is_compiling():  # a compiler joins them its own way
            return torch.relu(conv(x))
        if self.by_cudnn:
            return self._by_cudnn(x)
        if self.is_product:
            return self._as_product(x)
        if self.small is not None and self.small.takes(x) and self._is_small_best(self.small, x):
            return self.small(x)
        return self._by_library(x)

    def _by_library(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self._is_fused(x):
            return self._by_cudnn(x)
        if self._bias_relu is None:
            return torch.relu(conv(x))
        assert conv.bias is not None
        bare = F.conv2d(x, conv.weight, None, *_geometry(conv))
        return self._bias_relu(bare, conv.bias[None, :, None, None])

    def _by_cudnn(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self._adds_zeros:
            zeros = _zeros(_shape_out(conv, x), x)
            return torch.cudnn_convolution_add_relu(x, conv.weight, zeros, 0.0, conv.bias, *_geometry(conv))
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *_geometry(conv))

    def _as_product(self, x: Tensor) -> Tensor:
        conv = self.conv
        assert conv.bias is not None
        rows, channels, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)  # no copy where they are evenly spaced
        found = torch._addmm_activation(conv.bias, pixels, conv.weight.view(conv.out_channels, channels).t())
        return found.view(rows, height, width, -1).permute(0, 3, 1, 2)

    def _is_small_best(self, small: "SmallKernel", x: Tensor) -> bool:
        shape = tuple(x.shape)
        if shape not in self.small_wins and torch.backends.cudnn.benchmark and x.is_cuda:
            self._by_library(x)  # which searches
            self.small_wins[shape] = _device_ms(partial(small, x)) < _device_ms(partial(self._by_library, x))
        # Sizes for which nothing was searched do as those for which it was.
        return self.small_wins.get(shape, all(self.small_wins.values()))

    def _is_fused(self, x: Tensor) -> bool:
        if not self._fuse:
            return False
        shape = tuple(x.shape)
        if shape not in self.fused and torch.backends.cudnn.benchmark:
            self.fused[shape] = self._try_cudnn(x)
        return self.fused.get(shape, False)

    def _try_cudnn(self, x: Tensor) -> bool:
        """Let cuDNN choose its algorithm, and compare what it computes with the convolution by torch's own means."""
        try:
            if not self._is_right(x):
                self._adds_zeros = True
                if not self._is_right(x):
                    raise RuntimeError("it computes something else")
        except torch.OutOfMemoryError:
            raise  # smaller batches are tried
        except RuntimeError as error:
            why = str(error).partition("\n")[0][:200]
            logger.warning("a convolution of %s runs as two kernels, not as cuDNN's one: %s", tuple(x.shape), why)
            self._fuse = False
            return False
        return True

    def _is_right(self, x: Tensor) -> bool:
        """Whatever lay in the memory that it writes to: cuDNN adds that to its result, times 0, unless it is given what
        to add."""
        conv = self.conv
        found = self._by_cudnn(x)
        found.fill_(torch.nan)
        del found  # what is allocated next lies there
        found = self._by_cudnn(x)
        if not bool(found.isfinite().all()):
            return False
        assert conv.bias is not None
        weight, bias = conv.weight.float(), conv.bias.float()
        torch.backends.cudnn.enabled = False
        try:
            ends = slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)
            expected = [torch.relu(F.conv2d(x[end].float(), weight, bias, *_geometry(conv))) for end in ends]
            return all(_same(found[end], wanted) for end, wanted in zip(ends, expected, strict=True))
        finally:
            torch.backends.cudnn.enabled = True


def _geometry(conv: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    assert not isinstance(conv.padding, str)
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _shape_out(conv: nn.Conv2d, x: Tensor) -> tuple[int, int, int, int]:
    assert not isinstance(conv.padding, str)
    of = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    height, width = ((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in of)
    return x.shape[0], conv.out_channels, height, width


_zero_runs: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
"""The last is the longest; none goes, as graphs read them."""


def _zeros(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Zeros [rows, channels, height, width], channels-last, the same for all."""
    rows, channels, height, width = shape
    runs, n = _zero_runs.setdefault((like.device, like.dtype), []), rows * channels * height * width
    if not runs or len(runs[-1]) < n:
        runs.append(like.new_zeros(n))
    return runs[-1][:n].view(rows, height, width, channels).permute(0, 3, 1, 2)


def _device_ms(run: Callable[[], Tensor]) -> float:
    """What something takes on the GPU; it sleeps first, so that no launch is waited for."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    for _ in range(TIMED_RUNS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / TIMED_RUNS


def _same(found: Tensor, expected: Tensor) -> bool:
    tolerance = SAME * float(expected.abs().max())
    lies = found.is_contiguous(memory_format=torch.channels_last)
    return lies and torch.allclose(found.float(), expected.float(), rtol=0.0, atol=tolerance)


def can_join(conv: nn.Conv2d) -> bool:
    return conv.bias is not None and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def can_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matrix product with bias and ReLU computes on a device what it should."""
    try:
        x, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in ((70, 24), (16, 24), (16,)))
        found = torch._addmm_activation(bias, x, weight.t()).float()
        if not torch.allclose(
            found, torch.relu(F.linear(x.float(), weight.float(), bias.float())), rtol=0.02, atol=0.02
        ):
            raise RuntimeError("it computes something else")
    except RuntimeError as error:
        logger.warning("convolutions of 1 x 1 pixels are no matrix products: %s", str(error).partition("\n")[0])
        return False
    return True


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
    """Return the same stage, whose convolutions are joined with bias and ReLU by cuDNN, all of them."""
    joined = copy.deepcopy(stage)
    for module in joined.modules():
        if isinstance(module, ConvRelu):
            module.by_cudnn = True
    return joined
