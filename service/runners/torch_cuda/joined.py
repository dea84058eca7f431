"""A convolution, its bias and its ReLU in one kernel, by cuBLAS or cuDNN, or in two. Torch alone runs three.

A 1 x 1 convolution is a matrix product. cuBLAS fuses it with both, without a search, and is as fast as cuDNN. For few
channels, a custom kernel (`small_conv`) may be faster; it is timed against cuDNN's.

cuDNN's fused kernel is as fast as its convolution alone if it may try all its algorithms; otherwise it picks slow ones.
It is used for batch sizes for which there was time to try (`Cuda.searching`) and its results were right. Otherwise the
convolution is followed by a second kernel for bias and ReLU, which NVRTC, shipped with torch, compiles.
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

# NaN stays NaN, as with torch's own ReLU.
CODE = "template <typename T> T bias_relu(T x, T bias) { T sum = x + bias; return sum < T(0) ? T(0) : sum; }"
SAME = 0.01  # of the largest value: sums in half precision depend on the order
ALIGNED = 8  # matrix products need channels in multiples of this
TIMED_RUNS = 10
SLEEP_CYCLES = 4_000_000  # some 2 ms, in which the timed runs are launched
CHECKED_ROWS = 4  # at each end of a batch

logger = logging.getLogger(__name__)


class SmallKernel(Protocol):
    """See `small_conv.SmallConv`."""

    def takes(self, x: Tensor) -> bool: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class ConvRelu(nn.Module):
    """A convolution with a bias, and the ReLU after it.

    Args:
        conv: provides weights and bias; it is kept, not copied.
        bias_relu: one kernel for both; None uses torch's, one after the other.
        fuse: whether cuDNN's fused kernel is tried.
        multiply: whether to compute it as a matrix product if possible.
    """

    def __init__(self, conv: nn.Conv2d, bias_relu: BiasRelu | None, fuse: bool = False, multiply: bool = False) -> None:
        super().__init__()
        self.conv, self.by_cudnn = conv, False
        self._bias_relu, self._fuse, self._multiply = bias_relu, fuse, multiply
        self.fused: dict[tuple[int, ...], bool] = {}
        """By the input's shape, once tried: whether cuDNN's fused kernel is right."""
        self._adds_zeros = False
        self.small: SmallKernel | None = None
        self.small_wins: dict[tuple[int, ...], bool] = {}
        """By the input's shape, once timed: whether `small` was faster than the rest."""

    def around(self, conv: nn.Conv2d) -> "ConvRelu":
        """The same options around another convolution."""
        return ConvRelu(conv, self._bias_relu, self._fuse, self._multiply)

    @property
    def is_product(self) -> bool:
        conv = self.conv
        wide = conv.in_channels % ALIGNED == 0 and conv.out_channels % ALIGNED == 0
        alone = conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
        return self._multiply and wide and alone

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if torch.compiler.is_compiling():  # a compiler fuses them in its own way
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
        pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)  # no copy if pixels are evenly spaced
        found = torch._addmm_activation(conv.bias, pixels, conv.weight.view(conv.out_channels, channels).t())
        return found.view(rows, height, width, -1).permute(0, 3, 1, 2)

    def _is_small_best(self, small: "SmallKernel", x: Tensor) -> bool:
        shape = tuple(x.shape)
        if shape not in self.small_wins and torch.backends.cudnn.benchmark and x.is_cuda:
            self._by_library(x)  # lets cuDNN search
            self.small_wins[shape] = _device_ms(partial(small, x)) < _device_ms(partial(self._by_library, x))
        # At sizes that were not timed, use it if it was faster at all sizes that were.
        return self.small_wins.get(shape, all(self.small_wins.values()))

    def _is_fused(self, x: Tensor) -> bool:
        if not self._fuse:
            return False
        shape = tuple(x.shape)
        if shape not in self.fused and torch.backends.cudnn.benchmark:
            self.fused[shape] = self._try_cudnn(x)
        return self.fused.get(shape, False)

    def _try_cudnn(self, x: Tensor) -> bool:
        """Let cuDNN choose an algorithm; returns whether its fused kernel gives what torch does without cuDNN."""
        try:
            if not self._is_right(x):
                self._adds_zeros = True
                if not self._is_right(x):
                    raise RuntimeError("its results differ")
        except torch.OutOfMemoryError:
            raise  # the runner then tries smaller batches
        except RuntimeError as error:
            why = str(error).partition("\n")[0][:200]
            logger.warning("a convolution of %s runs as two kernels, not as cuDNN's fused one: %s", tuple(x.shape), why)
            self._fuse = False
            return False
        return True

    def _is_right(self, x: Tensor) -> bool:
        """Whether cuDNN's fused kernel is right, whatever its output's memory held: unless cuDNN is given a tensor to
        add, it adds those contents times 0."""
        conv = self.conv
        found = self._by_cudnn(x)
        found.fill_(torch.nan)
        del found  # the next allocation reuses its memory
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
"""The last is the longest. Graphs read them, so none is ever freed."""


def _zeros(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Zeros [rows, channels, height, width], channels-last, in memory that all callers share."""
    rows, channels, height, width = shape
    runs, n = _zero_runs.setdefault((like.device, like.dtype), []), rows * channels * height * width
    if not runs or len(runs[-1]) < n:
        runs.append(like.new_zeros(n))
    return runs[-1][:n].view(rows, height, width, channels).permute(0, 3, 1, 2)


def _device_ms(run: Callable[[], Tensor]) -> float:
    """The mean GPU time of a function. The GPU sleeps first, so that it does not wait for launches."""
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
    """Whether a matrix product fused with bias and ReLU gives the right results on a device."""
    try:
        x, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in ((70, 24), (16, 24), (16,)))
        found = torch._addmm_activation(bias, x, weight.t()).float()
        if not torch.allclose(
            found, torch.relu(F.linear(x.float(), weight.float(), bias.float())), rtol=0.02, atol=0.02
        ):
            raise RuntimeError("its results differ")
    except RuntimeError as error:
        logger.warning("1 x 1 convolutions do not run as matrix products: %s", str(error).partition("\n")[0])
        return False
    return True


def make_bias_relu(device: torch.device, dtype: torch.dtype) -> BiasRelu | None:
    """Compile a kernel for bias and ReLU; None without a GPU, or with a warning if it fails or its results differ."""
    if device.type != "cuda":
        return None
    try:
        made = torch.cuda.jiterator._create_jit_fn(CODE)
        x, bias = torch.randn((2, 6, 5, 5), dtype=dtype, device=device), torch.randn((1, 6, 1, 1), device=device)
        x, bias = x.to(memory_format=torch.channels_last), bias.to(dtype)
        found, expected = made(x, bias), torch.relu(x + bias)
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2) or found.stride() != expected.stride():
            raise RuntimeError("its results differ")
    except Exception as error:  # of any type: NVRTC is missing or refuses
        logger.warning("bias and ReLU run as two kernels, as one for both cannot be used: %s", error)
        return None
    return cast(BiasRelu, made)


def by_cudnn(stage: Stage) -> Stage:
    """Return a copy of a stage in which every convolution runs as cuDNN's fused kernel."""
    joined = copy.deepcopy(stage)
    for module in joined.modules():
        if isinstance(module, ConvRelu):
            module.by_cudnn = True
    return joined
