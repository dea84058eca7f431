"""When a lane posts its results: not while it needs the interpreter for the next batch, and never too late."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue

import numpy as np
import pytest

from models.scores import HeadScore
from service.engine.lanes import Batch, ThreadLanes
from service.engine.rows import Options, Request
from service.runners.base import StageOutput
from service.runners.blocks import Block, RowState

LIMIT_S = 30.0


class Runner:
    """Tells what it is asked for; a row of which the value is negative can't be gathered."""

    n_stages, n_lanes, max_rows = 1, 1, 4

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def first_state(self, image: np.ndarray) -> RowState:
        return RowState(Block({"x": image[None]}, 1), 0)

    def run(self, stage: int, rows: Sequence[RowState]) -> StageOutput:
        return self.gathered(rows)()

    def gathered(self, rows: Sequence[RowState]) -> Callable[[], StageOutput]:
        number = int(rows[0].block.values["x"][0])
        self.events.append(f"gather {number}")
        if number < 0:
            raise ValueError("no such row")

        def run() -> StageOutput:
            self.events.append(f"run {number}")
            return StageOutput(np.zeros((len(rows), 3), np.float32), Block({}, len(rows)), 0.0)

        return run

    def warm_up(self, limit_s: float = 1.0) -> Sequence[Mapping[int, float]]:
        self.events.append("trial")
        return [{1: 1.0}]


class Preparing(Runner):
    def prepare(self, stage: int, rows: Sequence[RowState]) -> Callable[[], StageOutput]:
        return self.gathered(rows)


def score(logits: np.ndarray) -> np.ndarray:
    return np.zeros(len(logits))


def batch(runner: Runner, number: int, stage: int = 0) -> Batch:
    state = runner.first_state(np.array(number))
    return Batch(stage, [Request(None, print, Options(), state)])


def served(kind: type[Runner], numbers: Sequence[int]) -> tuple[list[str], list[Batch]]:
    """What happens where all batches wait before the lane begins, and the batches in the order they came back."""
    events: list[str] = []
    runner, posted = kind(events), SimpleQueue[Batch]()

    def post(ran: Batch) -> None:
        events.append(f"post {names[ran]}")
        posted.put(ran)

    lanes = ThreadLanes(runner, HeadScore(score), post)
    batches = [batch(runner, number, -1 if number == 0 else 0) for number in numbers]  # 0: a trial
    names = dict(zip(batches, numbers, strict=True))
    for each in batches:
        lanes.put(each)
    lanes.start()
    came = [posted.get(timeout=LIMIT_S) for _ in batches]
    lanes.stop(LIMIT_S)
    return events, came


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Preparing, ["gather 1", "run 1", "gather 2", "post 1", "run 2", "post 2"]),
        (Runner, ["gather 1", "run 1", "post 1", "gather 2", "run 2", "post 2"]),
    ],
)
def test_a_batch_is_posted_just_before_the_next_one_runs(kind, expected):
    events, _ = served(kind, [1, 2])
    assert events == expected


@pytest.mark.parametrize("kind", [Preparing, Runner])
def test_rows_that_cannot_be_gathered_fail_alone(kind):
    events, came = served(kind, [1, -2, 3])
    assert [str(ran.error) for ran in came] == ["None", "no such row", "None"]
    assert [ran.result is None for ran in came] == [False, True, False]
    assert events.index("post 1") < events.index("post -2") < events.index("post 3")


def test_before_a_trial_or_a_given_up_batch_the_previous_one_is_posted():
    events, came = served(Preparing, [1, 0, 2])
    assert events == ["gather 1", "run 1", "post 1", "trial", "gather 2", "post 0", "run 2", "post 2"]
    assert all(ran.error is None for ran in came)


@pytest.mark.parametrize("kind", [Runner, Preparing])
def test_a_lane_stops_after_its_batches(kind):
    events: list[str] = []
    runner, posted = kind(events), SimpleQueue[Batch]()
    lanes = ThreadLanes(runner, HeadScore(score), posted.put)
    lanes.put(batch(runner, 1))
    lanes.put(batch(runner, 2))
    lanes.start()
    lanes.stop(LIMIT_S)
    assert [posted.get(timeout=LIMIT_S).result is not None for _ in range(2)] == [True, True]


def test_an_idle_lane_keeps_no_batch():
    runner, posted = Preparing([]), SimpleQueue[Batch]()
    lanes = ThreadLanes(runner, HeadScore(score), posted.put)
    lanes.start()
    for number in (1, 2):  # the second is put when the first is there, so the lane had posted it without waiting
        lanes.put(batch(runner, number))
        assert posted.get(timeout=LIMIT_S).result is not None
    lanes.stop(LIMIT_S)


class Token:
    """A request's token; a weak reference shows when nothing refers to it any more."""


@pytest.mark.parametrize("kind", [Runner, Preparing])
def test_a_waiting_lane_keeps_no_request_alive(kind: type[Runner]) -> None:
    posted = SimpleQueue[weakref.ref[Token]]()
    lanes = ThreadLanes(runner := kind([]), HeadScore(score), lambda ran: posted.put(weakref.ref(ran.rows[0].token)))
    lanes.start()
    request = Request(Token(), print, Options(), runner.first_state(np.array(1)))
    lanes.put(Batch(0, [request]))
    del request
    token, deadline_s = posted.get(timeout=LIMIT_S), time.monotonic() + LIMIT_S
    while token() is not None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert token() is None
    lanes.stop(LIMIT_S)
