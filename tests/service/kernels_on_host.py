"""The kernels' own text, compiled for the processor: a thread of a warp that talks to its neighbours is a real thread.

`compile_on_host` takes the place of `torch.cuda._compile_kernel`; the arguments and the grid are those of the GPU's.
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
#include <atomic>
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>
#define ON_HOST
#define __global__
#define __device__
#define __forceinline__ inline
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
struct Place { unsigned x; };
static thread_local Place blockIdx, threadIdx, blockDim;
static float widened(unsigned short half) { _Float16 x; __builtin_memcpy(&x, &half, 2); return x; }
static unsigned short narrowed(float x) {
    _Float16 half = (_Float16)x;
    unsigned short bits;
    __builtin_memcpy(&bits, &half, 2);
    return bits;
}
static std::barrier<>* together;
static double passed[32];
template <typename T> static T __shfl_xor_sync(unsigned, T value, int step) {
    passed[threadIdx.x] = value;
    together->arrive_and_wait();
    T theirs = (T)passed[threadIdx.x ^ step];
    together->arrive_and_wait();
    return theirs;
}
// What tensor cores do: every lane holds parts of both factors and of the result.
static unsigned held[32][6];
static void multiply(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, uint2 b) {
    unsigned mine[6] = {a0, a1, a2, a3, b.x, b.y}, lane = threadIdx.x;
    for (int i = 0; i < 6; i++) held[lane][i] = mine[i];
    together->arrive_and_wait();
    auto part = [](unsigned both, int k) { return widened((unsigned short)(k % 2 ? both >> 16 : both)); };
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            float a = part(held[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k);
            c[i] += a * part(held[column * 4 + k % 8 / 2][4 + k / 8], k);
        }
    }
    together->arrive_and_wait();
}
"""

# A kernel whose threads talk has one warp a block; all others run one after the other.
LAUNCH = r"""
extern "C" void launch(unsigned blocks, unsigned threads, void** a) {
    bool talks = TALKS;
    std::barrier<> barrier(talks ? threads : 1);
    together = &barrier;
    auto work = [&](unsigned thread) {
        for (unsigned block = 0; block < blocks; block++) {
            blockIdx.x = block, threadIdx.x = thread, blockDim.x = threads;
            KERNEL(ARGUMENTS);
            if (talks) barrier.arrive_and_wait();
        }
    };
    if (!talks) for (unsigned thread = 0; thread < threads; thread++) work(thread);
    else {
        std::vector<std::thread> warp;
        for (unsigned thread = 0; thread < threads; thread++) warp.emplace_back(work, thread);
        for (auto& one : warp) one.join();
    }
}
"""

needs_compiler = pytest.mark.skipif(which("g++") is None, reason="no C++ compiler is there")


def compile_on_host(folder: Path) -> Callable[[str, str], Any]:
    """Return what compiles kernels, once each, into `folder`."""

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
            how = ["g++", "-std=c++20", "-O2", "-w", "-pthread", "-shared", "-fPIC", "-o", library, text]
            subprocess.run(how, check=True, capture_output=True, text=True)
        launch_kernel = ctypes.CDLL(str(library)).launch

        def run(grid: Sequence[int], block: Sequence[int], given: Sequence[Any]) -> None:
            assert grid[1:] == block[1:] == (1, 1)
            kept = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int(x) for x in given]
            pointers = (ctypes.c_void_p * len(kept))(*(ctypes.addressof(one) for one in kept))
            launch_kernel(grid[0], block[0], pointers)

        return run

    return compile_kernel
