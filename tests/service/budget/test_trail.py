"""The run-length encoded history of a sum gives the same past values as a list of every answer."""

from collections import deque

import numpy as np
import pytest

from service.budget.trail import Trail

LENGTH = 50


@pytest.mark.parametrize("jumps", [False, True])
def test_it_equals_a_list_of_every_answer(jumps: bool) -> None:
    """Also if the sum changed between two runs for reasons other than answers."""
    rng = np.random.default_rng(int(jumps))
    trail, last = Trail(LENGTH, 7), 7
    kept = deque([7], maxlen=LENGTH + 1)
    for _ in range(2_000):
        last += int(rng.integers(-9, 9)) if jumps else 0
        step, n_answers = int(rng.integers(-(10**15), 10**15)), int(rng.integers(1, 30))
        trail.add(last, step, n_answers)
        kept.extend(last + step * i for i in range(1, n_answers + 1))
        last = kept[-1]
        for n in (0, 1, int(rng.integers(len(kept))), len(kept) - 1):
            assert trail.ago(n) == kept[-1 - n]
    assert trail.n_answers > 100 * LENGTH


def test_outside_its_range_it_returns_the_first_or_last_sum() -> None:
    trail = Trail(LENGTH, 1.5)
    assert (trail.ago(0), trail.ago(9), trail.ago(-9)) == (1.5, 1.5, 1.5)
    trail.add(1.5, 2.0, 3)
    assert (trail.ago(-9), trail.ago(1), trail.ago(3), trail.ago(9)) == (7.5, 5.5, 1.5, 1.5)


def test_its_size_is_bounded() -> None:
    trail = Trail(LENGTH, 0)
    for i in range(10_000):
        trail.add(i, 1, 1)
        assert len(trail._ends) <= 2 * LENGTH + 1
    assert trail.ago(LENGTH) == 10_000 - LENGTH
