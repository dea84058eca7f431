"""Answers made from the results of a batch."""

from collections.abc import Sequence

import numpy as np
import pytest

from service.engine.answering import answers_of
from service.engine.lanes import Batch, BatchResult
from service.engine.rows import Answer, Options, Request
from service.engine.wishes import rank
from service.runners.blocks import NO_VALUES, Block, RowState
from tests.service.virtual import N_EXITS, world


@pytest.mark.parametrize("leading", [1, 3])
def test_of_two_equal_classes_the_runners_choice_comes_first(leading: int) -> None:
    """Whichever of the two it is: a device may choose another one than numpy."""
    logits = np.array([[0.0, 2.0, 1.0, 2.0]], np.float32)
    rows = [Request("token", lambda told: None, Options(top_k=3), RowState(NO_VALUES, 0))]
    batch = Batch(0, rows)
    result = BatchResult(logits, Block({}, 1), 0.0, [leading], [0.5], [0.4])
    _, [answer] = answers_of(batch, result, ["confident"], 1.0, ["a", "b", "c", "d"], 1.0, False)
    assert [class_id for class_id, _ in answer.top_k] == [leading, 4 - leading, 2]
    assert answer.top_k[0] == (answer.class_id, answer.confidence)
    assert answer.label == "abcd"[leading]


def test_equal_classes_are_ranked_by_their_numbers() -> None:
    logits = np.random.default_rng(0).integers(0, 3, (20, 100)).astype(np.float32)
    ranked = rank(logits, [0.5] * len(logits), 100)
    for row, best in zip(logits, ranked, strict=True):
        assert [class_id for class_id, _ in best] == sorted(range(100), key=lambda class_id: (-row[class_id], class_id))


class Watch:
    """Keeps what each batch was observed to take."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, float, Sequence[float]]] = []

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        self.batches.append((stage, pytest.approx(seconds), pytest.approx(queue_seconds)))

    def answered(self, answers: Sequence[Answer]) -> None:
        pass


def test_an_answers_times_cover_all_stages_and_a_batchs_its_own() -> None:
    """Two images run in batches of 10 ms, before each of which they wait for 5 ms."""
    watch = Watch()
    here = world(observer=watch)
    here.admit("pinned", Options(exit=2))
    here.admit("late", Options(exit=N_EXITS, deadline_s=here.now_s + 0.040))  # halfway through stage 3
    for _ in range(3):
        here.wait_until(here.now_s + 0.005)
        batch = here.start()
        assert batch is not None
        here.wait_until(here.now_s + 0.010)
        here.finish(batch)
    assert [(a.queue_ms, a.compute_ms) for a in map(here.answer, ("pinned", "late"))] == [
        pytest.approx((10.0, 20.0)),
        pytest.approx((20.0, 20.0)),  # stage 3 had not returned
    ]
    assert watch.batches == [(1, 0.010, [0.005, 0.005]), (2, 0.010, [0.005, 0.005]), (3, 0.010, [0.005])]
