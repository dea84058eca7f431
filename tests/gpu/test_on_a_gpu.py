"""Tests of the GPU runners that need a GPU (`make test-gpu`); everything else of them is tested without one."""

import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from models.bundle import Bundle, load_bundle
from models.normalise import Normalise
from service.runners.base import Runner
from service.runners.choice import open_runner
from service.runners.providers import tensorrt_version
from service.runners.slotted import SlotRunner
from service.runners.torch_cuda.kernel_making import make_kernels
from service.runners.torch_cuda.kernel_sources import SOURCES
from service.runners.torch_cuda.kernels import Ways
from service.runners.torch_cuda.network import load_network
from service.runners.torch_cuda.runner import open_torch_runner
from service.runners.torch_cuda.small_conv import make_small_conv
from tests.bundles import REPOSITORY
from tests.service.apps import PNG, png
from tests.service.engine.test_engine import balanced, running
from tests.service.process import environment, running_server
from tests.service.slotted import (
    TOO_LITTLE_FOR_ANY,
    TOO_LITTLE_MEMORY,
    all_free,
    close,
    engine_around,
    logits_of,
    run_side_by_side,
)
from tests.waiting import LIMIT_S

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and `-m gpu`")]

BUNDLE = REPOSITORY / "models/zoo/cifar100-msdnet"
CUDA = torch.device("cuda", 0)
HALF = 5e-3  # of the largest logit
N_CLIENTS = 16


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(BUNDLE)


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    """SYNTHETIC images, as smooth as photographs."""
    coarse = torch.rand((300, 3, 5, 5), generator=torch.Generator().manual_seed(1))
    smooth = F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)
    return (255 * smooth).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="module")
def expected(bundle: Bundle, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """The logits of every exit, in float32 on the CPU."""
    normalise = Normalise(bundle.manifest.input.mean, bundle.manifest.input.std)
    with torch.inference_mode():
        return [logits.numpy() for logits in load_network(bundle)(normalise(torch.from_numpy(images)))]


@pytest.fixture(scope="module")
def runner(bundle: Bundle) -> SlotRunner[Any]:
    runner = open_torch_runner(bundle, 64, 512)
    runner.warm_up()
    return runner


def answers_as_float32_does(
    runner: Runner, images: NDArray[np.uint8], expected: list[NDArray[np.float32]], tolerance: float = HALF
) -> None:
    for found, wanted in zip(logits_of(runner, images[: runner.max_rows]), expected, strict=True):
        close(found, wanted[: len(found)], tolerance)


def test_every_kernel_compiles_and_is_correct(caplog: pytest.LogCaptureFixture) -> None:
    kernels = make_kernels(CUDA, Ways())
    assert [name for name in SOURCES if name not in kernels] == []
    assert kernels.compile_kernel is not None
    for n_in, n_out, stride in ((8, 16, 1), (24, 8, 2), (128, 32, 1)):
        conv = nn.Conv2d(n_in, n_out, 3, stride, 1).to(CUDA, torch.float16)
        assert make_small_conv(kernels.compile_kernel, conv) is not None
    assert caplog.messages == []


def test_regrouped_rows_get_the_float32_answers(
    runner: SlotRunner[Any], images: NDArray[np.uint8], expected: list[NDArray[np.float32]]
) -> None:
    answers_as_float32_does(runner, images, expected)
    largest = [float(np.abs(logits).max()) for logits in expected]

    def check(stage: int, ids: Any, output: Any) -> None:
        off = np.abs(output.logits - expected[stage][list(ids)]).max()
        assert off <= HALF * largest[stage]

    run_side_by_side(runner, images, check)


def test_an_engine_answers_all_and_launches_asynchronous_batches_itself(
    bundle: Bundle, runner: SlotRunner[Any], images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, threads = runner.launch, set()

    def launched(*arguments: Any, **options: Any) -> Any:
        threads.add(threading.current_thread().name)
        return launch(*arguments, **options)

    monkeypatch.setattr(runner, "launch", launched)
    engine = engine_around(runner, bundle, max_in_flight_rows=512)
    with running(engine):
        threads.clear()  # of the warm-up
        for image in images[:20]:
            engine.submit(image).result(LIMIT_S)
        answers = [future.result(LIMIT_S) for future in [engine.submit(image) for image in images]]
        assert len({answer.exit for answer in answers}) > 1
        assert threads == ({"exitserve-engine"} if runner.runs_ahead else {"exitserve-lane-1", "exitserve-lane-2"})
        assert balanced(engine.stats())
    del engine, answers
    assert all_free(runner.slots)


def test_auto_measures_the_available_runners_and_takes_the_fastest(
    bundle: Bundle, images: NDArray[np.uint8], expected: list[NDArray[np.float32]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answers_as_float32_does(open_runner(bundle, max_rows=64, max_in_flight_rows=512), images, expected)
    said = "\n".join(caplog.messages)
    assert "the runner torch-cuda takes " in said
    assert "the runner onnx on cuda " in said  # with its time, or the reason why it is left out
    assert "chosen: the runner " in said


@pytest.mark.filterwarnings("default")  # as errors, deprecations in torch itself and its advice end each compilation
def test_compiled_stages_give_the_same_answers(
    bundle: Bundle, images: NDArray[np.uint8], expected: list[NDArray[np.float32]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.runners.torch_cuda.compiling")
    runner = open_torch_runner(bundle, 64, 512, compile_stages=True)
    runner.warm_up()
    for stage in range(1, 1 + runner.n_stages):
        assert f"stage {stage} by torch.compile takes " in caplog.text
    answers_as_float32_does(runner, images, expected)


@pytest.mark.skipif(tensorrt_version() is None, reason="TensorRT is not installed")
def test_tensorrt_gives_the_float32_answers_and_caches_its_engines(
    bundle: Bundle,
    images: NDArray[np.uint8],
    expected: list[NDArray[np.float32]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner = open_runner(bundle, "onnx", device="tensorrt", max_rows=64, max_in_flight_rows=512)
    runner.warm_up()
    answers_as_float32_does(runner, images, expected, 0.02)
    kept = {path: path.stat().st_mtime for path in tmp_path.rglob("*") if path.is_file()}
    assert kept
    again = open_runner(bundle, "onnx", device="tensorrt", max_rows=64, max_in_flight_rows=512)
    again.warm_up()
    assert {path: path.stat().st_mtime for path in kept} == kept


# Leaves so many MiB of the device's memory, or all of it, and opens the runner with what is left. Libraries use memory
# besides torch's, so usage is read from the device. Batches are large, so that they use most of it.
SHORT_OF_MEMORY = """
import logging, sys
import numpy as np
import torch
from models.bundle import load_bundle
from service.runners.base import RunnerError
from service.runners.torch_cuda.device import Cuda
from service.runners.torch_cuda.runner import open_torch_runner

def used_mib():
    torch.cuda.empty_cache()
    return (free - held.nbytes - torch.cuda.mem_get_info()[0]) // 2**20

logging.basicConfig(level=logging.WARNING, format="%(message)s")
free, _ = torch.cuda.mem_get_info()
left = int(sys.argv[2]) * 2**20 or free
held = torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda")
state_mib = 0
try:
    runner = open_torch_runner(load_bundle(sys.argv[1]), 2048, 2048, device=Cuda(search_s=1.0))
    state_mib = used_mib()
    runner.warm_up()
    output = runner.run(0, [runner.first_state(np.zeros((32, 32, 3), np.uint8)) for _ in range(runner.max_rows)])
    assert np.isfinite(output.logits).all()
    print("rows", runner.max_rows)
except RunnerError as error:
    print("ended:", error)
print(state_mib, used_mib())
"""


def run_short_of_memory(left_mib: int) -> tuple[str, str, list[int]]:
    """Open a runner short of memory; returns outcome, log, and the MiB used before the warm-up and at the end."""
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(BUNDLE), str(left_mib)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, became, used_mib = done.stdout.splitlines()
    return became, done.stderr, [int(mib) for mib in used_mib.split()]


def test_with_little_memory_batches_shrink_or_the_start_fails_with_the_reason() -> None:
    became, log, (state_mib, used_mib) = run_short_of_memory(0)
    assert became == "rows 2048", log
    assert TOO_LITTLE_MEMORY.partition("{")[0] not in log
    n_smaller = 0
    for share in (0.6, 0.35):
        became, log, _ = run_short_of_memory(int(state_mib + share * (used_mib - state_mib)))
        print(share, state_mib, used_mib, became, log)  # shown if the test fails
        n_rows = int(became.removeprefix("rows ")) if became.startswith("rows ") else 0
        if 0 < n_rows < 2048:
            assert TOO_LITTLE_MEMORY.format(2048) in log
            n_smaller += 1
        else:
            assert n_rows or ("memory" in became and "lower --max-" in became) or TOO_LITTLE_FOR_ANY in became
    assert n_smaller
    became, log, _ = run_short_of_memory(40)
    assert became.startswith("ended: "), became
    assert "memory" in became


# A server whose device is really lost once the file `go` exists: a wrong index makes an assertion fail on it.
LOSES_ITS_DEVICE = """
import sys, threading, time
from pathlib import Path
import torch
from service.__main__ import main

def lose_it(go):
    while not go.exists():
        time.sleep(0.01)
    try:
        torch.zeros(1, device="cuda")[torch.tensor([7], device="cuda")]
        torch.cuda.synchronize()
    except RuntimeError:
        pass

threading.Thread(target=lose_it, args=(Path(sys.argv.pop(1)),), daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("options", [[], ["--http-workers", "2"]], ids=["one process", "workers"])
def test_a_server_that_loses_its_device_answers_503_and_ends(
    tmp_path: Path, images: NDArray[np.uint8], options: list[str]
) -> None:
    go = tmp_path / "go"
    program = (sys.executable, "-c", LOSES_ITS_DEVICE, str(go))
    arguments = ("--runner", "torch-cuda", "--max-batch-rows", "32", *options)
    with running_server(BUNDLE, tmp_path / "log", *arguments, program=program) as server:
        body = png(images[0])
        all_answered = threading.Barrier(N_CLIENTS, go.touch)

        def ask_until_it_is_gone(_: int) -> list[int]:
            statuses = []
            with httpx.Client(timeout=LIMIT_S) as client:
                while True:
                    try:
                        statuses.append(client.post(f"{server.url}/classify", content=body, headers=PNG).status_code)
                    except httpx.TransportError:
                        return statuses
                    if len(statuses) == 20:
                        all_answered.wait(LIMIT_S)

        with ThreadPoolExecutor(N_CLIENTS) as pool:
            statuses = list(pool.map(ask_until_it_is_gone, range(N_CLIENTS)))
        assert server.process.wait(LIMIT_S) == 1
    assert {status for each in statuses for status in each} <= {200, 503}
    assert all(200 in each for each in statuses)
    assert any(503 in each for each in statuses)
    assert "the device is lost" in (tmp_path / "log").read_text()
