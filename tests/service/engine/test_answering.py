"""Answers made from the results of a batch."""

import numpy as np
import pytest

from service.engine.answering import answers_of
from service.engine.lanes import Batch, BatchResult
from service.engine.rows import Options, Request
from service.runners.blocks import NO_VALUES, Block, RowState


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
