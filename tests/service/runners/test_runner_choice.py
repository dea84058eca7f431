"""Choosing the runner: as requested; else onnx at once without a GPU, and with one the fastest available."""

import logging
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from models.bundle import Bundle, load_bundle
from models.onnx_weights import load_stage_session
from service.runners import choice, providers
from service.runners.base import FatalRunnerError, Runner, RunnerError
from service.runners.onnx import OnnxRunner
from service.runners.providers import (
    CUDA,
    TENSORRT,
    Device,
    check_loaded,
    cuda_device_count,
    engine_cache,
    is_lost,
    tensorrt_options,
)
from tests.bundles import REPOSITORY


class Timed(OnnxRunner):
    """The real runner, with stage times set by the test."""

    image_s = 0.0

    def warm_up(self, limit_s: float = 1.0) -> list[dict[int, float]]:
        return [{1: 1.0, 8: 8 * self.image_s / self.n_stages}] * self.n_stages


def timed(bundle: Bundle, image_s: float) -> Timed:
    runner = Timed(bundle, 8, 1)
    runner.image_s = image_s
    return runner


def test_the_faster_is_chosen(bundle: Bundle) -> None:
    slow, fast = timed(bundle, 0.004), timed(bundle, 0.003)
    assert choice.fastest({"slow": lambda: slow, "fast": lambda: fast}) is fast
    assert choice.fastest({"fast": lambda: fast, "slow": lambda: slow}) is fast


def test_runners_that_cannot_run_are_skipped_with_a_warning(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> Runner:
        raise RunnerError("this GPU has no room")

    slow = timed(bundle, 0.004)
    with caplog.at_level(logging.INFO):
        assert choice.fastest({"torch-cuda": refuse, "onnx": lambda: slow}) is slow
    assert "the runner torch-cuda is left out: this GPU has no room" in caplog.messages
    assert "the runner onnx takes 4.000 ms per image in full batches" in caplog.messages
    with pytest.raises(RunnerError, match="no runner can run on this machine; torch-cuda: this GPU has no room"):
        choice.fastest({"torch-cuda": refuse})


def test_a_library_that_raises_its_own_errors_does_not_prevent_others(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Runner:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")

    slow = timed(bundle, 0.004)
    assert choice.fastest({"torch-cuda": fail, "onnx": lambda: slow}) is slow
    assert "the runner torch-cuda is left out: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED" in caplog.messages
    with pytest.raises(RunnerError, match="no runner can run on this machine; torch-cuda: cuDNN error"):
        choice.fastest({"torch-cuda": fail})


def test_a_runner_that_cannot_warm_up_leaves_its_memory_to_the_next(bundle: Bundle) -> None:
    def fail(limit_s: float = 1.0) -> list[dict[int, float]]:
        raise RunnerError("this GPU has no room")

    opened: list[weakref.ref[Runner]] = []

    def open_failing() -> Runner:
        failing = timed(bundle, 0.004)
        failing.warm_up = fail  # type: ignore[method-assign]  # no method: its frame in the traceback would hold it
        opened.append(weakref.ref(failing))
        return failing

    def open_next() -> Runner:
        assert opened[0]() is None
        return timed(bundle, 0.004)

    choice.fastest({"torch-cuda": open_failing, "onnx": open_next})


def test_the_memory_of_a_runner_let_go_is_returned_to_the_device(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch keeps what is freed, and the parts of its networks form cycles, which only the garbage collector frees."""
    happened: list[str] = []

    class InACycle(Timed):
        itself: Runner

    def opened(name: str, image_s: float) -> Runner:
        runner = InACycle(bundle, 8, 1)
        runner.itself, runner.image_s = runner, image_s
        weakref.finalize(runner, happened.append, f"{name} freed")
        happened.append(f"{name} opened")
        return runner

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("returned"))
    chosen = choice.fastest({"slow": lambda: opened("slow", 0.004), "fast": lambda: opened("fast", 0.003)})
    assert happened[-4:] == ["returned", "fast opened", "slow freed", "returned"]
    del chosen
    happened.clear()
    chosen = choice.fastest(
        {
            "fast": lambda: opened("fast", 0.003),
            "slow": lambda: opened("slow", 0.004),
            "next": lambda: opened("next", 1.0),
        }
    )
    assert happened[-6:] == ["slow opened", "slow freed", "returned", "next opened", "next freed", "returned"]
    del chosen


def test_an_installed_torch_that_cannot_be_loaded_is_reported(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_gpu(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "service.runners.torch_cuda.runner", None)  # importing it raises ImportError
    with pytest.raises(RunnerError, match=r"torch, which is installed but cannot be loaded \(.*\): reinstall it"):
        choice.open_runner(bundle, "torch-cuda")


@pytest.mark.skipif(cuda_device_count() > 0, reason="this machine has a CUDA device")
def test_after_a_lost_device_no_other_runner_is_tried(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_it(*arguments: object, **options: object) -> Runner:
        raise FatalRunnerError("CUDA error: an illegal memory access was encountered")

    tried = timed(bundle, 0.004)
    with pytest.raises(FatalRunnerError, match="illegal memory access"):
        choice.fastest({"torch-cuda": lose_it, "onnx": lambda: tried})
    for device in ("auto", "cuda"):
        monkeypatch.setattr(choice, "check_device", lambda device: None)
        monkeypatch.setattr(choice, "cuda_device_count", lambda: 1)
        monkeypatch.setattr("service.runners.torch_cuda.runner.open_torch_runner", lose_it)
        with pytest.raises(FatalRunnerError, match="illegal memory access"):
            choice.open_runner(bundle, device=device)  # type: ignore[arg-type]


def test_without_a_gpu_auto_is_onnx_at_once(bundle: Bundle) -> None:
    assert isinstance(choice.open_runner(bundle, max_rows=4), OnnxRunner)
    with pytest.raises(RunnerError, match="choose the device cpu or auto"):
        choice.open_runner(bundle, device="cuda")
    with pytest.raises(RunnerError, match=r"torch-cuda was asked for, but torch .* sees no GPU"):
        choice.open_runner(bundle, "torch-cuda")
    with pytest.raises(RunnerError, match="torch-cuda runs on CUDA: choose the device auto or cuda"):
        choice.open_runner(bundle, "torch-cuda", device="cpu")


def test_int8_stages_are_for_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = load_bundle(REPOSITORY / "models/zoo/cifar100-msdnet").at("int8")
    monkeypatch.setattr(choice, "cuda_device_count", lambda: 1)
    assert isinstance(choice.open_runner(int8, device="cpu"), OnnxRunner)
    with pytest.raises(RunnerError, match="torch-cuda has no int8 stages: choose the precision fp32"):
        choice.open_runner(int8, "torch-cuda")


@pytest.mark.parametrize(
    ("name", "device", "tensorrt", "expected"),
    [
        ("auto", "auto", None, ["torch-cuda", "onnx on cuda"]),
        ("auto", "auto", 101500, ["torch-cuda", "onnx on cuda", "onnx on tensorrt"]),
        ("auto", "cuda", 101500, ["torch-cuda", "onnx on cuda"]),
        ("onnx", "auto", 101500, ["onnx on cuda", "onnx on tensorrt"]),
        ("onnx", "auto", None, ["onnx on cuda"]),
    ],
)
def test_with_a_gpu_auto_measures_the_available_runners(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    name: choice.RunnerName,
    device: Device,
    tensorrt: int | None,
    expected: list[str],
) -> None:
    asked: list[str] = []
    fast = timed(bundle, 0.001)

    def first(candidates: Mapping[str, object]) -> Runner:
        asked.extend(candidates)
        return fast

    with_a_gpu(monkeypatch, tensorrt)
    monkeypatch.setattr(choice, "fastest", first)
    assert choice.open_runner(bundle, name, device=device, max_rows=4) is fast
    assert asked == expected
    asked.clear()
    choice.open_runner(bundle, "onnx", device="cpu", max_rows=4)
    choice.open_runner(bundle, device="cpu", max_rows=4)
    assert not asked


def test_without_its_packages_a_runner_says_what_to_install(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_gpu(monkeypatch, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunnerError, match="needs a CUDA build of torch, which is not installed"):
        choice.open_runner(bundle, "torch-cuda")
    with pytest.raises(RunnerError, match="needs the package onnx, which is not installed: pip install onnx"):
        choice.open_runner(bundle, "onnx", device="cuda")


def with_a_gpu(monkeypatch: pytest.MonkeyPatch, tensorrt: int | None) -> None:
    monkeypatch.setattr(choice, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(choice, "check_device", lambda device: None)
    monkeypatch.setattr(choice, "tensorrt_version", lambda: tensorrt)


@pytest.mark.skipif(cuda_device_count() > 0, reason="this machine has a CUDA device")
@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="this ONNX Runtime knows no CUDA")
def test_a_provider_that_cannot_load_is_an_error_naming_what_is_missing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime is really asked for CUDA, for which this machine has no libraries, and falls back."""
    from service.runners.onnx_device import runner as onnx_device

    with_a_gpu(monkeypatch, None)
    monkeypatch.setattr(onnx_device, "check_device", lambda device: None)
    missing = r"cannot load CUDAExecutionProvider \(lib\w+\.so\.\d+: cannot open shared object file.*pip install"
    with pytest.raises(RunnerError, match=missing):
        choice.open_runner(bundle, "onnx", device="cuda", max_rows=4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    assert isinstance(choice.open_runner(bundle, max_rows=4), OnnxRunner)
    assert any("on the CPU, although there is a GPU" in message for message in caplog.messages)


@pytest.mark.skipif(cuda_device_count() > 0, reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_requested_device_that_is_absent_is_refused(bundle: Bundle, device: Device) -> None:
    with pytest.raises(RunnerError, match=f"the device {device} was asked for, but .*: choose the device cpu or auto"):
        choice.open_runner(bundle, "onnx", device=device)


def test_sessions_are_checked_for_the_provider_they_run_on(bundle: Bundle) -> None:
    session = load_stage_session(bundle.path, bundle.manifest.stages[0].file)
    check_loaded(session, "CPUExecutionProvider")
    for provider in (CUDA, TENSORRT):
        with pytest.raises(RunnerError, match=f"ONNX Runtime cannot load {provider}"):
            check_loaded(session, provider)


def test_cached_engines_are_separate_by_bundle_rows_versions_and_device(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(providers, "tensorrt_version", lambda: 101500)
    monkeypatch.setattr(providers, "cuda_device_name", lambda: "NVIDIA H100 80GB HBM3")
    folder = engine_cache(bundle, 64)
    name = f"{bundle.manifest.version}-fp16-64-ort-{ort.__version__}-trt-101500-NVIDIA-H100-80GB-HBM3"
    assert folder == tmp_path / "exitserve" / "tensorrt" / name
    assert folder.is_dir()
    assert engine_cache(bundle, 64) == folder
    others = [engine_cache(bundle, 32)]
    monkeypatch.setattr(providers, "cuda_device_name", lambda: "NVIDIA L4")
    others.append(engine_cache(bundle, 64))
    monkeypatch.setattr(providers, "tensorrt_version", lambda: 101600)
    others.append(engine_cache(bundle, 64))
    assert len({folder, *others}) == 4
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunnerError, match="set XDG_CACHE_HOME to a folder that can be written to"):
        engine_cache(bundle, 64)


def test_tensorrt_gets_every_shape_of_its_engines(bundle: Bundle, tmp_path: Path) -> None:
    stage = bundle.manifest.stages[1]
    options = tensorrt_options(stage, 64, tmp_path, ["Gather", "ScatterElements"])
    for name, n_rows in (("min", 1), ("opt", 64), ("max", 64)):
        shapes = dict(one.split(":") for one in options[f"trt_profile_{name}_shapes"].split(","))
        assert shapes == {v.name: "x".join(map(str, (n_rows, *v.shape))) for v in stage.inputs}
    assert options["trt_op_types_to_exclude"] == "Gather,ScatterElements"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize", True),
        ("CUDA failure 2: out of memory ; GPU=0", False),
        ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: images", False),
    ],
)
def test_fatal_errors_of_onnx_runtime_are_recognised(message: str, lost: bool) -> None:
    assert is_lost(RuntimeError(message)) is lost


def test_the_setting_reaches_the_runner(bundle_path: Path) -> None:
    from tests.service.apps import build_app

    with pytest.raises(RunnerError, match="torch-cuda runs on CUDA"):
        build_app(bundle_path, runner="torch-cuda")
