"""The custom kernels, and how each is called. If one is missing or does not fit its arguments, torch does its work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from service.runners.torch_cuda.kernel_sources import JUDGED
from service.runners.torch_cuda.scoring import judge_by_torch

Launch = Callable[..., None]
"""Called with (grid, block, arguments), like the results of `torch.cuda._compile_kernel`."""
Compile = Callable[[str, str], Launch]
"""Compiles (source, name) to the kernel of that name."""

THREADS = 256
WARP = 32
VECTOR_BYTES = 16
MAX_JOINED = 3
"""Maps that one launch concatenates at most."""
MAX_MOVED = 4
"""Values that one launch moves at most."""
GREY_LEVEL = 1 / 64
"""The value of a grey level in exact images: a power of two that makes them about as large as normalised images."""
CHANNELS_EACH = 4
"""Channels of an exact image: three colours, and ones."""


@dataclass(frozen=True)
class Ways:
    """The optimisations beyond torch's own operations to use. All are on, except for comparisons."""

    exact: bool = True  # images, biases and weights are rounded to half precision with the least loss
    product: bool = True  # 1 x 1 convolution, bias and ReLU as one matrix product
    fused: bool = True  # convolution, bias and ReLU as cuDNN's fused kernel
    widened: bool = True  # channels padded to multiples of 8
    bias_relu: bool = True
    concat: bool = True
    small: bool = True  # 3 x 3 convolutions of few channels by a custom kernel, where it is faster
    grown: bool = True  # maps to which layers concatenate others grow in place
    move: bool = True
    max_pool: bool = True
    centre: bool = True  # exact images, see `exact_images`
    judge: bool = True

    @classmethod
    def none(cls) -> "Ways":
        return cls(**{field.name: False for field in fields(cls)})

    @classmethod
    def exact_alone(cls) -> "Ways":
        """The one optimisation that runs on any device."""
        return replace(cls.none(), exact=True)


class Kernels:
    """The kernels that could be made, by name. `deepcopy` returns the same object.

    Args:
        compile_kernel: makes more of them.
    """

    def __init__(self, launches: dict[str, Launch] | None = None, compile_kernel: Compile | None = None) -> None:
        self._launches, self.compile_kernel = launches or {}, compile_kernel

    def __contains__(self, name: str) -> bool:
        return name in self._launches

    def __deepcopy__(self, memo: Any) -> "Kernels":
        return self  # kernels are handles of the driver's

    def bias_relu(self, x: Tensor, bias: Tensor) -> Tensor:
        """ReLU of a map [rows, channels, height, width] plus a bias [1, channels, 1, 1], in place."""
        if "bias_relu" not in self or not lies_in_vectors(x) or x.dtype != torch.float16:
            return torch.relu_(x.add_(bias))
        self._over(x.numel() // 8, "bias_relu", x, bias, x.numel() // 8, x.shape[1] // 8)
        return x

    def concat(self, maps: Sequence[Tensor], room: int = 0) -> Tensor:
        """Concatenate maps [rows, any, height, width] along their channels.

        Args:
            room: for how many channels each pixel of the result has room, see `append`.
        """
        whole = room * maps[0].element_size() % VECTOR_BYTES == 0
        if not whole or not self._can_concat(maps) or len(maps) > MAX_JOINED:
            return torch.cat(list(maps), 1)
        rows, _, height, width = maps[0].shape
        n_channels = sum(x.shape[1] for x in maps)
        out = _empty_map(maps[0], rows, max(room, n_channels), height, width)[:, :n_channels]
        self._lay_beside(out, maps)
        return out

    def append(self, first: Tensor, others: Sequence[Tensor], room: int = 0) -> Tensor:
        """Concatenate, but without copying `first` if its pixels have room behind them for the others.

        `first` itself does not change.
        """
        n_channels = first.shape[1] + sum(x.shape[1] for x in others)
        rows, _, height, width = first.shape
        stride = first.stride(3)
        spaced = (height * width * stride, 1, width * stride, stride)
        has_room = first.stride() == spaced and n_channels <= stride and first.dtype == others[0].dtype
        aligned = all(n * first.element_size() % VECTOR_BYTES == 0 for n in (first.shape[1], stride))
        if not has_room or not aligned or not self._can_concat(others) or len(others) > MAX_JOINED:
            return self.concat([first, *others], room)
        out = first.as_strided((rows, n_channels, height, width), spaced)
        self._lay_beside(out[:, first.shape[1] :], others)
        return out

    def _can_concat(self, maps: Sequence[Tensor]) -> bool:
        return "concat" in self and len({x.dtype for x in maps}) == 1 and all(map(lies_in_vectors, maps))

    def _lay_beside(self, out: Tensor, maps: Sequence[Tensor]) -> None:
        widths = [_vectors_per_pixel(x) for x in maps] + [0] * (MAX_JOINED - len(maps))
        n_pixels = maps[0].shape[0] * maps[0].shape[2] * maps[0].shape[3]
        stride = out.stride(3) * out.element_size() // VECTOR_BYTES
        sources = (*maps, maps[0], maps[0])[:MAX_JOINED]
        self._over(n_pixels * sum(widths), "concat", out, *sources, *widths, n_pixels, stride)

    def max_pool(self, x: Tensor, size: int, stride: int, padding: int) -> Tensor:
        """Max pooling over squares of `size` pixels; see `torch.nn.MaxPool2d`."""
        if "max_pool" not in self or not lies_in_vectors(x) or x.dtype != torch.float16:
            return F.max_pool2d(x, size, stride, padding)
        rows, channels, height, width = x.shape
        out_height, out_width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
        out = _empty_map(x, rows, channels, out_height, out_width)
        n_vectors = out.numel() // 8
        sides = height, width, out_height, out_width, channels // 8
        self._over(n_vectors, "max_pool", out, x, n_vectors, *sides, size, stride, padding)
        return out

    def centre(self, images: Tensor, levels: Tensor, n_copies: int) -> Tensor:
        """Turn images, uint8 [rows, height, width, 3], into float16 [rows, 4 x n_copies, height, width], channels-last.

        See `exact_images`; `levels` are float32 [3], `n_copies` is 1 or 2.
        """
        rows, height, width, _ = images.shape
        n_pixels = rows * height * width
        aligned = images.is_contiguous() and n_pixels % 4 == 0 and images.data_ptr() % 4 == 0
        if "centre" not in self or not aligned:
            return centred(images, levels, n_copies, torch.float16)
        out = torch.empty((rows, height, width, CHANNELS_EACH * n_copies), dtype=torch.float16, device=images.device)
        self._over(n_pixels // 4, "centre", out, images, levels, n_pixels // 4, n_copies)
        return out.permute(0, 3, 1, 2)

    def move(self, slots: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], out: bool) -> None:
        """Copy rows out of stores if `out`, else into them.

        Args:
            slots: int64 [rows].
            pairs: a store [slots, ...] and rows [rows, ...] each. `lies_in_runs` must be true of both, except that rows
                of maps [rows, height, width, channels] may have gaps of whole vectors between their pixels.
        """
        for start in range(0, len(pairs), MAX_MOVED):
            part, arguments, total = pairs[start : start + MAX_MOVED], [], 0
            for store, rows in part:
                n_vectors = store[0].nbytes // VECTOR_BYTES
                arguments += [store, rows, n_vectors, *_spacing(rows, n_vectors)]
                total += n_vectors
            nothing = [part[0][0], part[0][1], 0, 1, 1] * (MAX_MOVED - len(part))
            self._over(len(slots) * total, "move", slots, len(slots), int(out), *arguments, *nothing)

    def judge(self, logits: Tensor, score: str, heads: Tensor) -> None:
        """Write class, `models.exits.confidence` and score of logits [rows, classes] to `heads`, float64 [rows, 3].

        If several classes lead with equal logits, the kernel takes the first, torch any of them.

        Args:
            score: a key of `scoring.SCORES`.
        """
        contiguous = logits.is_contiguous() and heads.is_contiguous()
        if "judge" not in self or logits.dtype != torch.float32 or not contiguous:
            return judge_by_torch(logits, score, heads)
        arguments = heads, logits, logits.shape[1], JUDGED.index(score)
        self._launches["judge"]((len(logits), 1, 1), (WARP, 1, 1), arguments)

    def _over(self, n_threads: int, name: str, *arguments: Any) -> None:
        if n_threads:
            self._launches[name](((n_threads + THREADS - 1) // THREADS, 1, 1), (THREADS, 1, 1), arguments)


def centred(images: Tensor, levels: Tensor, n_copies: int, dtype: torch.dtype) -> Tensor:
    """`Kernels.centre` in torch, to any `dtype`."""
    pixels = ((images.float() - levels) * GREY_LEVEL).to(dtype)
    whole = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=3)
    return whole.repeat(1, 1, 1, n_copies).permute(0, 3, 1, 2)


def lies_in_vectors(x: Tensor) -> bool:
    """Whether a map [rows, channels, height, width] is channels-last, and its pixels are whole, aligned vectors."""
    whole = x.ndim == 4 and x.shape[1] * x.element_size() % VECTOR_BYTES == 0
    return whole and x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % VECTOR_BYTES == 0


def lies_in_runs(rows: Tensor) -> bool:
    """Whether rows [rows, ...] are contiguous, and each is whole, aligned vectors."""
    return rows.is_contiguous() and rows[:1].nbytes % VECTOR_BYTES == 0 and rows.data_ptr() % VECTOR_BYTES == 0


def _spacing(rows: Tensor, n_vectors: int) -> tuple[int, int]:
    """Vectors per pixel, and from one pixel to the next. Contiguous rows count as one pixel each."""
    if rows.is_contiguous():
        return n_vectors, n_vectors
    size = rows.element_size()
    return rows.shape[-1] * size // VECTOR_BYTES, rows.stride(-2) * size // VECTOR_BYTES


def _vectors_per_pixel(x: Tensor) -> int:
    return x.shape[1] * x.element_size() // VECTOR_BYTES


def _empty_map(like: Tensor, rows: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty((rows, height, width, channels), dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)
