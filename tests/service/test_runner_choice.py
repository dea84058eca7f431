"""Which runner runs a bundle: as asked, else onnx at once without a GPU, else the faster of those that can run."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from models.bundle import Bundle, load_bundle
from service.runners import choice
from service.runners.base import Runner, RunnerError
from service.runners.onnx import OnnxRunner, cuda_device_count, is_lost
from tests.bundles import REPOSITORY, tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


class Timed(OnnxRunner):
    """The real runner, whose stages take as long as the test says."""

    image_s = 0.0

    def warm_up(self, limit_s: float = 1.0) -> list[dict[int, float]]:
        return [{1: 1.0, 8: 8 * self.image_s / self.n_stages}] * self.n_stages


def timed(bundle: Bundle, image_s: float) -> Timed:
    runner = Timed(bundle, 8, 1, "cpu")
    runner.image_s = image_s
    return runner


def test_the_faster_is_chosen(bundle: Bundle) -> None:
    slow, fast = timed(bundle, 0.004), timed(bundle, 0.003)
    assert choice.fastest({"slow": lambda: slow, "fast": lambda: fast}) is fast
    assert choice.fastest({"fast": lambda: fast, "slow": lambda: slow}) is fast


def test_what_cannot_run_is_left_out_with_a_warning(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> Runner:
        raise RunnerError("this GPU has no room")

    slow = timed(bundle, 0.004)
    with caplog.at_level(logging.INFO):
        assert choice.fastest({"torch-cuda": refuse, "onnx": lambda: slow}) is slow
    assert "the runner torch-cuda is left out: this GPU has no room" in caplog.messages
    assert "the runner onnx takes 4.000 ms an image in full batches" in caplog.messages
    with pytest.raises(RunnerError, match="no runner can run on this machine; torch-cuda: this GPU has no room"):
        choice.fastest({"torch-cuda": refuse})


@pytest.mark.skipif(cuda_device_count() > 0, reason="this machine has a CUDA device")
def test_without_a_gpu_auto_is_onnx_at_once(bundle: Bundle) -> None:
    assert isinstance(choice.open_runner(bundle, max_rows=4), OnnxRunner)
    with pytest.raises(RunnerError, match=r"torch-cuda was asked for, but torch .* sees no GPU"):
        choice.open_runner(bundle, "torch-cuda")
    with pytest.raises(RunnerError, match="torch-cuda runs on GPUs: choose the device auto or cuda"):
        choice.open_runner(bundle, "torch-cuda", device="cpu")


def test_int8_stages_are_for_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = load_bundle(REPOSITORY / "models/zoo/cifar100-msdnet").at("int8")
    monkeypatch.setattr(choice, "cuda_device_count", lambda: 1)
    assert isinstance(choice.open_runner(int8, device="cpu"), OnnxRunner)
    with pytest.raises(RunnerError, match="torch-cuda has no int8 stages: choose the precision fp32"):
        choice.open_runner(int8, "torch-cuda")


def test_with_a_gpu_and_torch_auto_measures_both(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []

    def first(candidates: Mapping[str, object]) -> Runner:
        asked.append(tuple(candidates))
        return timed(bundle, 0.001)

    monkeypatch.setattr(choice, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(choice, "fastest", first)
    choice.open_runner(bundle, max_rows=4)
    choice.open_runner(bundle, "onnx", device="cpu", max_rows=4)
    choice.open_runner(bundle, device="cpu", max_rows=4)
    assert asked == [("torch-cuda", "onnx")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunnerError, match="needs a CUDA build of torch, which is not installed"):
        choice.open_runner(bundle, "torch-cuda")


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize", True),
        ("CUDA failure 2: out of memory ; GPU=0", False),
        ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: images", False),
    ],
)
def test_errors_of_onnx_runtime_that_no_later_call_survives_are_told_apart(message: str, lost: bool) -> None:
    assert is_lost(RuntimeError(message)) is lost


def test_the_setting_reaches_the_runner(bundle_path: Path) -> None:
    from tests.service.apps import build_app

    with pytest.raises(RunnerError, match="torch-cuda runs on GPUs"):
        build_app(bundle_path, runner="torch-cuda")
