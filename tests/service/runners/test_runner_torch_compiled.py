"""The torch runner tries compilers on its stages, and uses results that are faster and equal."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.normalise import Normalise
from service.runners.torch_cuda.device import Host, HostStream, Program, Stream
from service.runners.torch_cuda.runner import TorchCudaRunner
from tests.bundles import IMAGE_SIZE_PX, MEAN, STD, random_images, tiny_network
from tests.service.slotted import close, logits_of

SHAPE = (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)
IMAGES = random_images(4, seed=51)


@pytest.fixture(scope="module")
def whole() -> list[NDArray[np.float32]]:
    """The logits [4, classes] of every exit of the trained network, in float32."""
    with torch.no_grad():
        return [x.numpy() for x in tiny_network()(Normalise(MEAN, STD)(torch.from_numpy(IMAGES)))]


@pytest.fixture(autouse=True)
def only_stages_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runners.torch_cuda.lane.time", SimpleNamespace(perf_counter=lambda: Slow.clock_s))


class Slow:
    """A stage that counts its calls, and takes `seconds` on a clock that nothing else moves."""

    clock_s = 0.0

    def __init__(self, stage: Any, seconds: float) -> None:
        self.stage, self.seconds, self.calls = stage, seconds, 0
        self.inputs, self.outputs = stage.inputs, stage.outputs

    def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        Slow.clock_s += self.seconds
        outputs: tuple[torch.Tensor, ...] = self.stage(*values)
        return outputs


def test_a_compiled_stage_is_used_if_faster_and_only_in_full_batches(
    whole: list[NDArray[np.float32]], caplog: pytest.LogCaptureFixture
) -> None:
    """Uncompiled stages take 20 ms longer here; of the compiled ones, one fails, one is slower, and two are used."""
    made: list[Slow] = []

    def compiler(stage: Any) -> Slow:
        made.append(Slow(stage.stage, 0.2 if len(made) == 2 else 0.0))
        if len(made) == 2:
            raise RuntimeError("no C compiler was found")
        return made[-1]

    runner = TorchCudaRunner(
        tiny_network(), SHAPE, MEAN, STD, None, 4, 16, device=Host(), dtype=torch.float32, compilers={"first": compiler}
    )
    runner.stages[:] = [Slow(stage, 0.02) for stage in runner.stages]  # type: ignore[misc]
    with caplog.at_level("INFO"):
        runner.warm_up(0.0)
    assert sorted(runner.compiled) == [0, 3]
    assert "stage 2 stays as it is, as first failed: no C compiler was found" in caplog.messages
    assert [message.rsplit(": ")[-1] for message in caplog.messages if " by first takes " in message] == [
        "used",
        "not used",
        "used",
    ]
    taken = [made[0], made[3]]
    for call in taken:
        call.calls = 0
    for n_rows in (4, 3, 2, 1):
        for ours, expected in zip(logits_of(runner, IMAGES[:n_rows]), whole, strict=True):
            close(ours, expected[:n_rows])
    assert [call.calls for call in taken] == [2, 2]  # of 4 and of 3 images, which run as 4


def test_the_fastest_compiler_with_equal_results_is_used(
    whole: list[NDArray[np.float32]], caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(Slow):
        """The fastest of all, which now and then adds to what lay in its output before: here, no number."""

        def __len__(self) -> int:  # as what torch.compile makes, it is neither true nor false
            raise TypeError("it does not support len()")

        def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(value + torch.empty_like(value).fill_(torch.nan) * 0 for value in super().__call__(*values))

    class Right(Wrong):
        def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return Slow.__call__(self, *values)

    compilers = {
        "wrong": lambda stage: Wrong(stage.stage, 0.0),
        "slower": lambda stage: Right(stage.stage, 0.01),
        "fastest": lambda stage: Right(stage.stage, 0.0),
    }
    runner = TorchCudaRunner(
        tiny_network(), SHAPE, MEAN, STD, None, 2, 16, device=Host(), dtype=torch.float32, compilers=compilers
    )
    runner.stages[:] = [Slow(stage, 0.03) for stage in runner.stages]  # type: ignore[misc]
    with caplog.at_level("INFO"):
        runner.warm_up(0.0)
    assert runner.compiled == dict.fromkeys(range(4), "fastest")
    assert caplog.messages.count("stage 1 stays as it is, as wrong failed: its results differ") == 1
    for ours, expected in zip(logits_of(runner, IMAGES[:2]), whole, strict=True):
        close(ours, expected[:2])


def test_a_compiler_must_be_right_and_clearly_faster_than_the_best_so_far(caplog: pytest.LogCaptureFixture) -> None:
    class Off(Slow):
        """The fastest, whose results are wrong by more than half precision explains."""

        def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(1.05 * value for value in super().__call__(*values))

    compilers = {
        "off": lambda stage: Off(stage.stage, 0.0),
        "hardly": lambda stage: Slow(stage.stage, 0.0295),
        "fast": lambda stage: Slow(stage.stage, 0.01),
        "slow": lambda stage: Slow(stage.stage, 0.025),
        "medium": lambda stage: Slow(stage.stage, 0.02),  # faster than the one before, but not than the best
    }
    runner = TorchCudaRunner(
        tiny_network(), SHAPE, MEAN, STD, None, 2, 16, device=Host(), dtype=torch.float32, compilers=compilers
    )
    runner.stages[:] = [Slow(stage, 0.03) for stage in runner.stages]  # type: ignore[misc]
    with caplog.at_level("INFO"):
        runner.warm_up(0.0)
    assert runner.compiled == dict.fromkeys(range(4), "fast")
    assert [message for message in caplog.messages if message.startswith("stage 1 ")] == [
        "stage 1 stays as it is, as off failed: its results differ",
        "stage 1 by hardly takes 29.500 ms for 2 images, else 30.000 ms: not used",
        "stage 1 by fast takes 10.000 ms for 2 images, else 30.000 ms: used",
        "stage 1 by slow takes 25.000 ms for 2 images, else 10.000 ms: not used",
        "stage 1 by medium takes 20.000 ms for 2 images, else 10.000 ms: not used",
    ]


class AddressesStream(HostStream):
    """A stream whose programs, like CUDA graphs, do not keep the stage alive that they run."""

    def prepare(self, program: Program) -> Program:
        super().prepare(program)
        run, (stage, bucket, call) = program.func, program.args  # type: ignore[attr-defined]
        held = weakref.ref(call)

        @torch.inference_mode()
        def replay() -> None:
            alive = held()
            assert alive is not None, "its weights are freed"
            run(stage, bucket, alive)

        return replay


class AddressesHost(Host):
    def open_stream(self) -> Stream:
        return AddressesStream()


def test_the_weights_of_a_compiled_stage_live_as_long_as_its_graphs(whole: list[NDArray[np.float32]]) -> None:
    compilers = {
        "used": lambda stage: Slow(stage.stage, 0.0),
        "not used": lambda stage: Slow(stage.stage, 0.05),
    }
    runner = TorchCudaRunner(
        tiny_network(), SHAPE, MEAN, STD, None, 2, 16, device=AddressesHost(), dtype=torch.float32, compilers=compilers
    )
    runner.stages[:] = [Slow(stage, 0.03) for stage in runner.stages]  # type: ignore[misc]
    runner.warm_up(0.0)
    assert runner.compiled == dict.fromkeys(range(4), "used")
    gc.collect()
    for ours, expected in zip(logits_of(runner, IMAGES[:2]), whole, strict=True):
        close(ours, expected[:2])


def test_a_stage_that_one_lane_cannot_take_stays_as_it_is_on_all(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = TorchCudaRunner(
        tiny_network(),
        SHAPE,
        MEAN,
        STD,
        None,
        2,
        16,
        device=Host(),
        dtype=torch.float32,
        n_lanes=3,
        compilers={"first": lambda stage: Slow(stage.stage, 0.0)},
    )
    runner.stages[:] = [Slow(stage, 0.02) for stage in runner.stages]  # type: ignore[misc]
    last = runner.lanes[-1]
    prepare = last.prepare

    def without_memory(stage: int, bucket: int, call: Any = None) -> None:
        if call is not None:
            raise RuntimeError("out of memory")
        prepare(stage, bucket)

    monkeypatch.setattr(last, "prepare", without_memory)
    with caplog.at_level("INFO"):
        runner.warm_up(0.0)
    assert runner.compiled == {}
    assert "stage 1 stays as it is, as first failed: out of memory" in caplog.messages
    before_s = Slow.clock_s
    for lane in runner.lanes:
        assert lane.seconds(0, 2, 1) == pytest.approx(0.02)
    assert Slow.clock_s > before_s
