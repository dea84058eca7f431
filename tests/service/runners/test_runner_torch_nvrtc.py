"""The torch runner's kernels, compiled with NVRTC as on a GPU, which does not need one."""

import ctypes
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.cuda._utils
from torch.utils import cpp_extension

from service.runners.torch_cuda import small_conv
from service.runners.torch_cuda.kernel_making import compiler_for
from service.runners.torch_cuda.kernel_sources import SOURCES

ALL = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
WITH_HALF_PRODUCTS = ALL[1:]  # mma.m16n8k16
CONVOLUTIONS = {
    f"convolve {n_in} to {n_out}, stride {stride}": small_conv.source(n_in, n_out, stride)
    for n_in, n_out, stride in ((8, 8, 1), (24, 16, 2), (128, 32, 1))
}


@pytest.fixture(scope="module")
def nvrtc() -> ctypes.CDLL:
    spec = find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(path for folder in folders for path in folder.glob("**/libnvrtc.so.1*"))
    if not found:
        pytest.skip("NVRTC is not there: pip install nvidia-cuda-nvrtc")
    for builtins in found[-1].parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(found[-1]))


def compile_for(nvrtc: ctypes.CDLL, source: str, arch: str) -> tuple[int, str]:
    """Compile; returns the size of the machine code (0 on failure) and the compiler's log."""
    program, n_code, n_log = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    nvrtc.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(f"--gpu-architecture={arch}".encode()))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(n_log))
    log = ctypes.create_string_buffer(n_log.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(n_code))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return n_code.value, log.value.decode()


@pytest.mark.parametrize("name", [*SOURCES, *CONVOLUTIONS])
def test_every_kernel_compiles_for_every_gpu_without_a_warning(nvrtc: ctypes.CDLL, name: str) -> None:
    for arch in ALL if name in SOURCES else WITH_HALF_PRODUCTS:
        n_code, log = compile_for(nvrtc, (SOURCES | CONVOLUTIONS)[name], arch)
        assert n_code > 0, f"{arch}: {log}"
        assert log == "", arch


def test_torch_compiles_kernels_on_a_machine_without_a_cuda_toolkit(
    nvrtc: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own function, which wants the folder of the toolkit's headers; all but loading the machine code."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.cuda._utils, "_get_nvrtc_library", lambda: nvrtc)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(torch.cuda._utils, "_cuda_load_module", lambda code, names: dict.fromkeys(names, code))
    compile_kernel = compiler_for(torch.device("cuda"))
    assert compile_kernel is not None
    for name, source in SOURCES.items():
        assert compile_kernel(source, name)
    assert compile_kernel(CONVOLUTIONS["convolve 24 to 16, stride 2"], "convolve")
    assert cpp_extension.CUDA_HOME is None


def test_invalid_source_does_not_compile(nvrtc: ctypes.CDLL) -> None:
    n_code, log = compile_for(nvrtc, 'extern "C" __global__ void broken(float* x) { y[0] = 1.0f; }', "sm_90")
    assert n_code == 0
    assert 'identifier "y" is undefined' in log
