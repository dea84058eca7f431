"""Runs the CUDA kernels' own source on the CPU. Threads of a warp that exchange data run in turns between exchanges.

`compile_on_host` replaces `torch.cuda._compile_kernel`; arguments and grid are the same as on the GPU.
"""

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch

HOST = r"""
#include <cmath>
#include <ucontext.h>
#define ON_HOST
#define __global__
#define __device__
#define __forceinline__ inline
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
struct Place { unsigned x; };
static Place blockIdx, threadIdx, blockDim;
static float widened(unsigned short half) { _Float16 x; __builtin_memcpy(&x, &half, 2); return x; }
static unsigned short narrowed(float x) {
    _Float16 half = (_Float16)x;
    unsigned short bits;
    __builtin_memcpy(&bits, &half, 2);
    return bits;
}
// Threads that talk have a stack each. Each runs until it has to meet the others, and then lets the next one run: when
// its turn comes again, all have come there.
static ucontext_t lanes[32], launched;
static char stacks[32][1 << 16];
static void meet() {
    unsigned mine = threadIdx.x;
    threadIdx.x = (mine + 1) % blockDim.x;
    swapcontext(&lanes[mine], &lanes[threadIdx.x]);
}
static double passed[32];
template <typename T> static T __shfl_xor_sync(unsigned, T value, int step) {
    passed[threadIdx.x] = value;
    meet();
    T theirs = (T)passed[threadIdx.x ^ step];
    meet();
    return theirs;
}
// What tensor cores do: every lane holds parts of both factors and of the result.
static unsigned held[32][6];
static void multiply(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, uint2 b) {
    unsigned mine[6] = {a0, a1, a2, a3, b.x, b.y}, lane = threadIdx.x;
    for (int i = 0; i < 6; i++) held[lane][i] = mine[i];
    meet();
    auto part = [](unsigned both, int k) { return widened((unsigned short)(k % 2 ? both >> 16 : both)); };
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            float a = part(held[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k);
            c[i] += a * part(held[column * 4 + k % 8 / 2][4 + k / 8], k);
        }
    }
    meet();
}
"""

# Kernels whose threads exchange data have one warp per block; the threads of all others run one after another.
LAUNCH = r"""
static void** a;
static unsigned n_blocks;
static void all_blocks() {
    for (unsigned block = 0; block < n_blocks; block++) {
        blockIdx.x = block;
        KERNEL(ARGUMENTS);
        if (TALKS) meet();
    }
}
extern "C" void launch(unsigned blocks, unsigned threads, void** arguments) {
    a = arguments, n_blocks = blocks, blockDim.x = threads, threadIdx.x = 0;
    if (!TALKS) for (; threadIdx.x < threads; threadIdx.x++) all_blocks();
    else {
        for (unsigned lane = 0; lane < threads; lane++) {
            getcontext(&lanes[lane]);
            lanes[lane].uc_stack.ss_sp = stacks[lane], lanes[lane].uc_stack.ss_size = sizeof stacks[lane];
            lanes[lane].uc_link = &launched;  // where the first lane returns, when the others have finished
            makecontext(&lanes[lane], all_blocks, 0);
        }
        swapcontext(&launched, &lanes[0]);
    }
}
"""

needs_compiler = pytest.mark.skipif(which("g++") is None, reason="there is no C++ compiler")


def compile_on_host(folder: Path) -> Callable[[str, str], Any]:
    """Return a function that compiles kernels into `folder`, each once."""

    def compile_kernel(source: str, name: str) -> Callable[..., None]:
        library = folder / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            found = re.search(rf"void {name}\((.*?)\)", source, re.DOTALL)
            assert found is not None
            types = [re.sub(r"\w+\s*$", "", one).strip() for one in found[1].split(",")]
            arguments = ", ".join(f"*({kind}*)a[{i}]" for i, kind in enumerate(types))
            launch = LAUNCH.replace("KERNEL", name).replace("ARGUMENTS", arguments)
            launch = launch.replace("TALKS", "true" if "__shfl" in source or "multiply(" in source else "false")
            text = library.with_suffix(".cpp")
            text.write_text(HOST + source + launch)
            how = ["g++", "-std=c++20", "-O2", "-w", "-shared", "-fPIC", "-o", library, text]
            subprocess.run(how, check=True, capture_output=True, text=True)
        launch_kernel = ctypes.CDLL(str(library)).launch

        def run(grid: Sequence[int], block: Sequence[int], given: Sequence[Any]) -> None:
            assert grid[1:] == block[1:] == (1, 1)
            kept = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int(x) for x in given]
            pointers = (ctypes.c_void_p * len(kept))(*(ctypes.addressof(one) for one in kept))
            launch_kernel(grid[0], block[0], pointers)

        return run

    return compile_kernel
