"""A custom kernel for a 3 x 3 convolution of few channels, its bias and its ReLU.

With few channels, cuDNN's kernels take up to twenty times as long as moving the maps, as their tiles are made for many.
Here a warp computes 32 pixels of all outputs on tensor cores (mma.m16n8k16), in steps of 16 of the 9 x inputs numbers
that a pixel depends on. There is one kernel per combination of inputs, outputs and stride. Needs float16 and sm_80.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.runners.torch_cuda.joined import ConvRelu
from service.runners.torch_cuda.kernel_sources import HALVES
from service.runners.torch_cuda.kernels import WARP, Compile, Launch, lies_in_vectors

MAX_INPUTS, MAX_OUTPUTS = 128, 32
TILES = 2  # per warp, of 16 pixels each
UNROLLED = 9  # steps, so that loads are issued early
logger = logging.getLogger(__name__)

# The rows of a fragment are pixels. Lane 4 r + q holds numbers 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of the 16 of pixels r
# and r + 8, and their results for outputs 2 q and 2 q + 1. Which inputs these numbers stand for is free, as long as the
# weights agree: if all 16 are of one tap, a lane takes four adjacent ones.
CODE = r"""
#ifndef ON_HOST
__device__ __forceinline__ void multiply(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, uint2 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}
#endif
extern "C" __global__ void convolve(
    unsigned* out, const unsigned* map, const uint2* weights, const unsigned short* bias, int n_pixels, int height,
    int width, int out_height, int out_width
) {
    const int lane = threadIdx.x, quarter = lane & 3;
    int top[2 * TILES], left[2 * TILES], start[2 * TILES];
#pragma unroll
    for (int r = 0; r < 2 * TILES; r++) {
        int pixel = blockIdx.x * 16 * TILES + 8 * r + (lane >> 2);
        int line = pixel / out_width, row = line / out_height;
        top[r] = pixel < n_pixels ? (line - row * out_height) * STRIDE - 1 : height;  // beyond it nothing is read
        left[r] = (pixel - line * out_width) * STRIDE - 1;
        start[r] = (row * height + top[r]) * width + left[r];
    }
    float sums[TILES][N_OUT / 8][4];
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int n = 0; n < N_OUT / 8; n++) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0.0f;
#pragma unroll UNROLLED
    for (int step = 0; step < (9 * N_IN + 15) / 16; step++) {
        unsigned a[2 * TILES][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half && N_IN % 16 == 0) break;
            int first = 16 * step + 8 * half, tap = first / N_IN, y = tap / 3, x = tap - 3 * y;
            int word = (first - tap * N_IN) / 2 + (N_IN % 16 ? quarter : 2 * quarter);
#pragma unroll
            for (int r = 0; r < 2 * TILES; r++) {
                bool inside = tap < 9 && (unsigned)(top[r] + y) < (unsigned)height
                    && (unsigned)(left[r] + x) < (unsigned)width;
                const unsigned* here = map + (long long)(start[r] + y * width + x) * (N_IN / 2) + word;
                if (N_IN % 16) a[r][half] = inside ? *here : 0u;
                else {
                    uint2 both = {0u, 0u};
                    if (inside) both = *(const uint2*)here;
                    a[r][0] = both.x, a[r][1] = both.y;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < N_OUT / 8; n++) {
            uint2 b = weights[(step * (N_OUT / 8) + n) * 32 + lane];
#pragma unroll
            for (int m = 0; m < TILES; m++)
                multiply(sums[m][n], a[2 * m][0], a[2 * m + 1][0], a[2 * m][1], a[2 * m + 1][1], b);
        }
    }
#pragma unroll
    for (int n = 0; n < N_OUT / 8; n++) {
        float low_bias = widened(bias[8 * n + 2 * quarter]), high_bias = widened(bias[8 * n + 2 * quarter + 1]);
#pragma unroll
        for (int r = 0; r < 2 * TILES; r++) {
            int pixel = blockIdx.x * 16 * TILES + 8 * r + (lane >> 2);
            float low = sums[r / 2][n][r % 2 * 2] + low_bias, high = sums[r / 2][n][r % 2 * 2 + 1] + high_bias;
            low = low < 0.0f ? 0.0f : low;
            high = high < 0.0f ? 0.0f : high;
            if (pixel < n_pixels)
                out[(long long)pixel * (N_OUT / 2) + 4 * n + quarter] = narrowed(low) | (unsigned)narrowed(high) << 16;
        }
    }
}
"""


def source(n_in: int, n_out: int, stride: int) -> str:
    numbers = {"N_IN": n_in, "N_OUT": n_out, "STRIDE": stride, "TILES": TILES, "UNROLLED": UNROLLED}
    return "".join(f"constexpr int {name} = {number};\n" for name, number in numbers.items()) + HALVES + CODE


class SmallConv:
    """The kernel with a convolution's weights, which must not change afterwards.

    Args:
        launch: compiled from `source` for the convolution's channels and stride.
    """

    def __init__(self, launch: Launch, conv: nn.Conv2d) -> None:
        assert conv.bias is not None
        self._launch, self._bias = launch, conv.bias.detach()
        self._weights = _arranged(conv.weight.detach())
        self._n_out, self._stride = conv.out_channels, conv.stride[0]

    def __deepcopy__(self, memo: Any) -> "SmallConv":
        return self  # a kernel is a handle of the driver's

    def takes(self, x: Tensor) -> bool:
        return lies_in_vectors(x) and x.dtype == torch.float16 and x.numel() > 0

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve a map [rows, inputs, height, width] for which `takes` is true, to [rows, outputs, ...]."""
        rows, _, height, width = x.shape
        out_height, out_width = ((side - 1) // self._stride + 1 for side in (height, width))
        out = torch.empty((rows, out_height, out_width, self._n_out), dtype=x.dtype, device=x.device)
        n_pixels = rows * out_height * out_width
        arguments = out, x, self._weights, self._bias, n_pixels, height, width, out_height, out_width
        self._launch((-(-n_pixels // (16 * TILES)), 1, 1), (WARP, 1, 1), arguments)
        return out.permute(0, 3, 1, 2)


def use_small_convs(stages: Sequence[nn.Module], compile_kernel: Compile) -> None:
    """Give small convolutions of lowered stages their kernel, to be tried; the stages must be on their device."""
    made: dict[tuple[int, int, int], Launch | None] = {}
    for module in (module for stage in stages for module in stage.modules()):
        if not isinstance(module, ConvRelu) or not is_small(module.conv):
            continue
        conv, device = module.conv, module.conv.weight.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return
        key = conv.in_channels, conv.out_channels, conv.stride[0]
        if key not in made:
            made[key] = make_small_conv(compile_kernel, conv)
        launch = made[key]
        module.small = SmallConv(launch, conv) if launch is not None else None


def is_small(conv: nn.Conv2d) -> bool:
    alone = conv.kernel_size == (3, 3) and conv.padding == conv.dilation == (1, 1) and conv.groups == 1
    sized = conv.in_channels <= MAX_INPUTS and conv.out_channels <= MAX_OUTPUTS
    aligned = conv.in_channels % 8 == 0 and conv.out_channels % 8 == 0
    half = conv.weight.dtype == torch.float16 and conv.bias is not None
    return alone and sized and aligned and half and conv.stride in ((1, 1), (2, 2))


def make_small_conv(compile_kernel: Compile, conv: nn.Conv2d) -> Launch | None:
    """Compile and check the kernel for a convolution's channels and stride; None, with a warning, if that fails."""
    what = conv.in_channels, conv.out_channels, conv.stride[0]
    try:
        launch = compile_kernel(source(*what), "convolve")
        _check(launch, conv)
    except Exception as error:  # of any type: NVRTC is missing or refuses, or results differ
        why = str(error).partition("\n")[0][:200]
        logger.warning("no custom kernel convolves %d channels to %d with stride %d: %s", *what, why)
        return None
    return launch


def _check(launch: Launch, like: nn.Conv2d) -> None:
    device = like.weight.device
    conv = nn.Conv2d(like.in_channels, like.out_channels, 3, like.stride[0], 1).to(device, torch.float16)
    small = SmallConv(launch, conv)
    for rows, height, width in ((1, 1, 1), (3, 5, 4), (2, 9, 8)):
        x = torch.randn((rows, conv.in_channels, height, width), device=device).to(torch.float16)
        x = x.contiguous(memory_format=torch.channels_last)
        wide = conv.weight.float(), conv.bias.float() if conv.bias is not None else None
        expected = torch.relu(F.conv2d(x.float(), *wide, conv.stride, conv.padding))
        found = small(x)
        if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=0.01, atol=0.01):
            raise RuntimeError("its results differ")


def _arranged(weight: Tensor) -> Tensor:
    """Reorder weights [outputs, inputs, 3, 3] to what each lane reads, [steps, outputs / 8, lanes, 4]."""
    n_out, n_in, _, _ = weight.shape
    by_place = weight.permute(0, 2, 3, 1).reshape(n_out, 9 * n_in)
    n_steps = (9 * n_in + 15) // 16
    padded = F.pad(by_place, (0, 16 * n_steps - 9 * n_in))
    lane = torch.arange(WARP)
    quarter, column = lane % 4, lane // 4
    half, low = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    apart, beside = 8 * half + 2 * quarter[:, None] + low, 4 * quarter[:, None] + 2 * half + low  # [lanes, 4]
    within = apart if n_in % 16 else beside
    chosen = 16 * torch.arange(n_steps)[:, None, None, None] + within  # [steps, 1, lanes, 4]
    outputs = 8 * torch.arange(n_out // 8)[:, None, None] + column[:, None]  # [outputs / 8, lanes, 1]
    return padded[outputs.to(weight.device), chosen.to(weight.device)].contiguous()
