"""Lanes of an asynchronous device, driven by the thread that puts batches: launch order and results."""

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from models.scores import HeadScore
from service.engine.lanes import TRIAL, Batch
from service.engine.launching import LaunchingLanes
from service.engine.rows import Options, Request
from service.runners.base import StageOutput
from service.runners.blocks import Block, RowState

LIMIT_S = 30.0
NO_ROOM, OUT_OF_MEMORY, LOST = -2, -3, -4  # fail at launch, at collection, and when polled


class Device:
    """A device whose batches, identified by the number in their first row, run on demand."""

    n_stages, max_rows, runs_ahead = 1, 4, True

    def __init__(self, n_lanes: int = 1) -> None:
        self.n_lanes = n_lanes
        self.events: list[str] = []
        self.ran: set[int] = set()
        self.wanted_logits: list[bool] = []
        self.may_try = threading.Event()
        self.trial_error: Exception | None = None

    def first_state(self, image: np.ndarray) -> RowState:
        return RowState(Block({"x": image[None]}, 1), 0)

    def run(self, stage: int, rows: Sequence[RowState]) -> StageOutput:
        raise AssertionError("batches are launched")

    def launch(self, stage: int, rows: Sequence[RowState], behind: Any = None, with_logits: bool = True) -> "Launched":
        assert behind is None or not behind.is_collected
        number = int(rows[0].block.values["x"][0])
        self.events.append(f"launch {number}" + (f" behind {behind.number}" if behind else ""))
        self.wanted_logits.append(with_logits)
        if number == NO_ROOM:
            raise ValueError("no room")
        return Launched(self, number)

    def warm_up(self, limit_s: float = 1.0) -> Sequence[Mapping[int, float]]:
        assert self.may_try.wait(LIMIT_S)
        if self.trial_error is not None:
            raise self.trial_error
        return [{1: 1.0}]


class Launched:
    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number, self.is_collected = device, number, False

    def has_run(self) -> bool:
        if self.number == LOST:
            raise RuntimeError("the device is lost")
        return self.number in self.device.ran

    def collect(self) -> StageOutput:
        self.is_collected = True
        if self.number == LOST:
            raise RuntimeError("the device is lost")
        self.device.events.append(f"collect {self.number}")
        if self.number == OUT_OF_MEMORY:
            raise ValueError("out of memory")
        return StageOutput(np.zeros((1, 3), np.float32), Block({}, 1), 0.0)


class Here:
    """Lanes of a device, and the batches put there."""

    def __init__(self, n_lanes: int = 1) -> None:
        self.device, self.posted = Device(n_lanes), list[Batch]()
        self.was_posted = threading.Event()
        self.lanes = LaunchingLanes(self.device, HeadScore(lambda logits: np.zeros(len(logits))), self.post)
        self.lanes.start()
        self.batches: dict[int, Batch] = {}

    def post(self, batch: Batch) -> None:
        self.posted.append(batch)
        self.was_posted.set()

    def put(self, *numbers: int, options: Options | None = None) -> None:
        for number in numbers:
            state = self.device.first_state(np.array(number))
            self.batches[number] = Batch(0, [Request(None, print, options or Options(), state)])
            self.lanes.put(self.batches[number])

    def put_trial(self) -> Batch:
        trial = Batch(TRIAL, [])
        self.lanes.put(trial)
        return trial

    def run(self, *numbers: int) -> list[int]:
        """Run batches; returns those that finished."""
        self.device.ran.update(numbers)
        return self.came()

    def came(self) -> list[int]:
        names = {batch: number for number, batch in self.batches.items()}
        return [names[batch] for batch in self.lanes.poll()]

    def events(self) -> list[str]:
        events, self.device.events = self.device.events, []
        return events


def test_a_lane_has_one_running_batch_and_one_launched_behind_it():
    here = Here()
    here.put(1, 2, 3)
    assert here.events() == ["launch 1", "launch 2 behind 1"]
    assert here.lanes.n_waiting == 1
    assert here.came() == []
    assert here.run(1) == [1]
    assert here.events() == ["collect 1", "launch 3 behind 2"]
    assert here.run(2, 3) == [2, 3]
    assert here.events() == ["collect 2", "collect 3"]
    assert here.lanes.n_waiting == 0
    assert all(here.batches[n].result is not None and not here.batches[n].states for n in (1, 2, 3))


def test_a_batch_begins_when_the_previous_one_has_returned():
    here = Here()
    here.put(1, 2)
    first, second = here.batches[1], here.batches[2]
    assert first.started_s > 0.0
    assert (second.started_s, second.behind) == (0.0, first)
    here.run(1)
    assert second.started_s == first.ended_s > first.started_s
    assert second.behind is None
    here.run(2)
    assert second.ended_s > second.started_s


def test_the_lane_with_the_least_to_do_gets_the_next_batch():
    here = Here(n_lanes=2)
    here.put(1, 2, 3, 4, 5)
    assert here.events() == ["launch 1", "launch 2", "launch 3 behind 1", "launch 4 behind 2"]
    assert here.run(2, 4) == [2, 4]
    assert here.events() == ["collect 2", "collect 4", "launch 5"]


@pytest.mark.parametrize(
    ("number", "error"), [(NO_ROOM, "no room"), (OUT_OF_MEMORY, "out of memory"), (LOST, "the device is lost")]
)
def test_a_failing_batch_fails_alone(number: int, error: str):
    here = Here()
    here.put(1, number, 2)
    assert sorted(here.run(1, 2, OUT_OF_MEMORY) + here.came()) == sorted((1, number, 2))
    failed = here.batches[number]
    assert (str(failed.error), failed.result, failed.states, failed.behind) == (error, None, (), None)
    assert 0.0 < failed.started_s <= failed.ended_s
    assert all(here.batches[n].error is None and here.batches[n].result is not None for n in (1, 2))


def test_nothing_is_launched_behind_a_given_up_batch():
    here = Here(n_lanes=2)
    here.put(1, 2)
    here.batches[1].given_up = True
    here.put(3, 4)
    assert here.events() == ["launch 1", "launch 2", "launch 3 behind 2"]
    assert here.lanes.n_waiting == 1
    assert here.run(2) == [2]
    assert here.events() == ["collect 2", "launch 4 behind 3"]
    assert here.run(1) == [1]  # its lane is available again
    here.put(5)
    assert here.events() == ["collect 1", "launch 5"]


def test_a_batch_given_up_before_its_launch_is_returned_unlaunched():
    here = Here()
    here.put(1, 2, 3)
    here.batches[3].given_up = True
    here.events()
    assert sorted(here.run(1) + here.came()) == [1, 3]
    assert here.events() == ["collect 1"]
    assert here.batches[3].ended_s > 0.0


@pytest.mark.parametrize("error", [None, RuntimeError("nothing runs")])
def test_a_trial_has_its_own_lane_and_delays_no_batch(error: Exception | None):
    here = Here(n_lanes=2)
    here.device.trial_error = error
    trial = here.put_trial()
    here.put(1, 2, 3)
    assert here.events() == ["launch 1", "launch 2 behind 1"]
    assert here.run(1, 2) == [1, 2]
    here.device.may_try.set()
    assert here.was_posted.wait(LIMIT_S)
    assert here.posted == [trial]
    assert trial.error is error
    assert 0.0 < trial.started_s <= trial.ended_s
    here.put(4, 5)
    here.lanes.poll()
    assert sorted(here.run(3, 4, 5)) == [3, 4, 5]
    assert here.posted == [trial]


def test_a_trial_waits_for_an_idle_lane():
    here = Here()
    here.put(1)
    here.device.may_try.set()
    trial = here.put_trial()
    assert here.lanes.n_waiting == 1
    here.put(2)
    assert here.events() == ["launch 1"]  # in their turn
    assert here.run(1) == [1]
    assert here.was_posted.wait(LIMIT_S)
    assert here.posted == [trial]
    assert here.run(2) == []  # the lane is free from here on
    assert here.came() == [2]


@pytest.mark.parametrize(("options", "wanted"), [(Options(), False), (Options(top_k=2), True), (Options(exit=1), True)])
def test_logits_are_fetched_only_if_a_row_needs_more_than_its_best_class(options: Options, wanted: bool):
    here = Here()
    here.put(1, options=options)
    assert here.device.wanted_logits == [wanted]


def test_stopping_waits_for_launched_batches_with_a_limit():
    here = Here()
    here.put(1, 2)
    threading.Timer(0.05, here.device.ran.update, [(1, 2)]).start()
    here.lanes.stop(LIMIT_S)
    assert here.events()[-2:] == ["collect 1", "collect 2"]
    here.put(3)
    started_s = time.perf_counter()
    here.lanes.stop(0.05)
    assert 0.05 <= time.perf_counter() - started_s < LIMIT_S


class Token:
    """A request's token; a weak reference shows when nothing refers to it any more."""


@pytest.mark.parametrize("run", [lambda here: here.run(1), lambda here: here.run(1, 2)])
def test_lanes_keep_no_finished_request_alive(run: Callable[[Here], list[int]]):
    here = Here()
    here.put(1, 2)
    token = Token()
    here.batches[1].rows[0].token = token
    left = weakref.ref(token)
    run(here)
    del token, here.batches[1]
    assert left() is None
