"""Rows of a failed batch are retried once, alone, alternating with other batches; their images are kept for that."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle
from service.budget.controller import BudgetController
from service.engine.core import Core
from service.engine.lanes import Batch
from service.engine.launching import LaunchingLanes
from service.engine.rows import Answer, Options, Request, Told
from service.engine.scheduler import Scheduler
from service.runners.onnx_device.runner import OnnxDeviceRunner
from service.runners.slotted import Running, SlotRunner
from service.runners.torch_cuda.device import Host
from service.runners.torch_cuda.runner import TorchCudaRunner, open_torch_runner
from tests.bundles import random_images
from tests.service.slotted import all_free, logits_of
from tests.service.virtual import world

N_ROWS = 6
NEVER = 2.0  # a confidence that no image reaches


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return random_images(N_ROWS, seed=71)


def on_torch(bundle: Bundle, canvas_px: int = 0) -> TorchCudaRunner:
    runner = open_torch_runner(bundle, 8, 64, device=Host(), canvas_px=canvas_px)
    runner.warm_up(0.0)
    return runner


def on_onnx(bundle: Bundle) -> OnnxDeviceRunner:
    runner = OnnxDeviceRunner(bundle, "cpu", 8, 64)
    runner.warm_up(0.0)
    return runner


class Here:
    """The core and the lanes of a runner, driven by the test instead of the engine's thread."""

    def __init__(self, runner: SlotRunner[Any], bundle: Bundle, score: Any = None) -> None:
        costs = bundle.costs_mflops
        budget = BudgetController(bundle.frontier(), costs, costs[-1], 1000)
        self.core = Core(budget, Scheduler(runner.n_stages, 8), bundle.manifest.class_names)
        self.lanes = LaunchingLanes(runner, score or bundle.score(), lambda batch: None)
        self.told: dict[int, Told] = {}
        self.runner = runner

    def admit(self, images: list[NDArray[np.uint8]]) -> None:
        """Admit images that all continue to the last exit."""
        options = Options(min_confidence=NEVER)
        states = [self.runner.first_state(image) for image in images]
        self.core.admit([Request(i, self._sink, options, state) for i, state in enumerate(states)], 0.0)

    def launch(self) -> Batch:
        batch = self.core.next_batch(0.0)
        assert batch is not None
        self.lanes.put(batch)
        return batch

    def take_back(self) -> None:
        for batch in self.lanes.poll():
            if not batch.given_up:
                self.core.finish(batch, 0.0)
        for sink, told in self.core.outbox.items():
            sink(told)
        self.core.outbox.clear()

    def labels(self) -> list[int]:
        """Run all waiting images; returns the labels in the images' order."""
        while len(self.told) < N_ROWS:
            self.launch()
            self.take_back()
        answers = [self.told[i] for i in range(N_ROWS)]
        return [answer.class_id for answer in answers if isinstance(answer, Answer)]

    def _sink(self, told: list[tuple[Any, Told]]) -> None:
        self.told.update(told)


def test_rows_retried_alone_alternate_with_other_batches() -> None:
    here = world(max_rows=4)
    for i in range(4):
        here.admit(f"again {i}", Options())
    failed = here.start()
    assert failed is not None
    for i in range(12):
        here.admit(i, Options())
    failed.error = RuntimeError("poisoned")
    here.core.finish(failed, here.now_s)
    batches = [here.start() for _ in range(7)]
    assert batches[-1] is not None
    sizes = [len(batch.rows) for batch in batches if batch is not None]
    assert sorted(sizes[:2]) == sorted(sizes[2:4]) == sorted(sizes[4:6]) == [1, 4]
    assert [row.token for row in batches[-1].rows] == ["again 3"]  # nothing else waits
    assert here.start() is None


def test_an_image_is_retried_once_at_every_stage() -> None:
    here = world()
    here.admit("a", Options(exit=4))

    def fail() -> None:
        batch = here.start()
        assert batch is not None
        batch.error = RuntimeError("poisoned")
        here.core.finish(batch, here.now_s)
        here.deliver()

    for _ in range(3):
        fail()
        batch = here.start()
        assert batch is not None
        here.finish(batch)
    fail()
    assert not here.told
    fail()
    assert str(here.outcome("a")) == "stage 4 failed: poisoned"
    assert here.core.n_failed == here.core.n_ended == 1


@pytest.mark.parametrize("px", [32, 40])  # the network's size, and one that the device scales
def test_a_hung_batch_that_returns_does_not_free_images_of_retried_rows(
    bundle: Bundle, images: NDArray[np.uint8], px: int
) -> None:
    runner = on_torch(bundle, canvas_px=80)
    pictures = [np.resize(image, (px, px, 3)) for image in images]
    expected = [int(logits.argmax()) for logits in logits_of(runner, pictures)[-1]]
    here = Here(runner, bundle)
    gate: list[bool] = []

    def hanging(launch: Callable[..., Running], *batch: Any) -> Running:
        return Running(launch(*batch).collect, lambda: bool(gate))

    launches = [lane.launch for lane in runner.lanes]
    for lane in runner.lanes:
        lane.launch = partial(hanging, lane.launch)  # type: ignore[method-assign]
    here.admit(pictures)
    hung = here.launch()
    for lane, launch in zip(runner.lanes, launches, strict=True):
        lane.launch = launch  # type: ignore[method-assign]
    here.take_back()
    assert len(hung.rows) == N_ROWS
    hung.given_up = hung.hung = True
    here.core.fail(hung, "has not come back", 0.0)
    here.launch()  # one of them is running
    gate.append(True)
    here.take_back()
    del hung
    assert here.labels() == expected
    assert all_free(runner.slots)
    assert runner.slots.n_places_taken == 0


class Unlucky:
    """A score that fails with an out-of-memory error the first time."""

    def __init__(self, score: Any) -> None:
        self._score, self.asked = score, 0

    @property
    def history_width(self) -> int:
        self.asked += 1
        if self.asked == 1:
            raise MemoryError("no memory for scores")
        return self._score.history_width  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._score, name)


def test_rows_of_a_batch_that_cannot_be_scored_are_retried(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    runner = on_torch(bundle)
    expected = [int(logits.argmax()) for logits in logits_of(runner, images)[-1]]
    score = Unlucky(bundle.score())
    here = Here(runner, bundle, score)
    here.admit([*images])
    assert here.labels() == expected
    assert score.asked > 1 + N_ROWS  # of them all, then of each alone


@pytest.mark.parametrize("open_runner", [on_torch, on_onnx])
def test_an_image_is_kept_until_its_result_is_processed(
    bundle: Bundle, images: NDArray[np.uint8], open_runner: Callable[[Bundle], SlotRunner[Any]]
) -> None:
    runner = open_runner(bundle)
    rows = [runner.first_state(image) for image in images]
    first, again = (runner.run(0, rows).logits for _ in range(2))
    np.testing.assert_array_equal(first, again)
    del rows
    here = Here(runner, bundle)
    here.admit([*images])
    assert runner.slots.n_places_taken == N_ROWS
    here.launch()
    here.take_back()
    assert here.core.scheduler.queued_rows(1) == N_ROWS
    assert runner.slots.n_places_taken == 0
