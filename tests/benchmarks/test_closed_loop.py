"""The closed loop's numbers, with an engine that answers at once and a clock that only it moves."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import closed_loop
from benchmarks.closed_loop import SAMPLED, Load
from service.engine.rows import Answer


class Instant:
    """Answers image i of a run at exit 1 if i is even, else at exit 2, after 1 ms of the clock for each.

    It had already answered a hundred images, which are none of the run's.
    """

    stage_seconds = (0.0, 0.0)

    def __init__(self) -> None:
        self.clock_s, self.sent = 50.0, []
        self._exits = Counter({(1, "confident"): 40, (2, "final"): 60})
        self._spent_mflops, self._idle_mflops = 1000.0, 500.0

    def stats(self) -> Any:
        return SimpleNamespace(exits=dict(self._exits), idle_mflops=self._idle_mflops)

    def budget_state(self) -> Any:
        return SimpleNamespace(spent_answered_mflops=self._spent_mflops)

    def submit_all(self, take: Any, tokens: list[None], images: Any, which: list[int]) -> None:
        outcomes = []
        for token, _ in zip(tokens, which, strict=True):
            i = len(self.sent) + len(outcomes)
            number, reason, mflops = ((1, "confident", 10.0), (2, "final", 30.0))[i % 2]
            self._exits[number, reason] += 1
            self._spent_mflops += mflops
            self._idle_mflops += 0.5
            self.clock_s += 0.001
            # Every `SAMPLED`th answer, which are those recorded, spent longer than the others.
            queue_ms, compute_ms, rows = (7.0, 2.0, 16) if i % SAMPLED == 0 else (1.0, 1.0, 4)
            outcomes.append((token, Answer(0, "", 1.0, (), number, reason, mflops, queue_ms, compute_ms, rows)))  # type: ignore[arg-type]
        self.sent += which
        take(outcomes)

    def flush(self) -> None:
        pass


def test_a_run_counts_its_own_images_costs_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Instant()
    monkeypatch.setattr(closed_loop, "time", SimpleNamespace(perf_counter=lambda: engine.clock_s))
    images = np.zeros((5, 2, 2, 3), np.uint8)
    found = Load(engine, images, 3, n_images=20).run()  # type: ignore[arg-type]
    assert engine.sent == [*range(5)] * 4
    assert found.images_per_s == pytest.approx(1000)
    assert found.shares == [0.5, 0.5]
    assert found.mean_mflops == pytest.approx(20)
    assert found.idle_mflops == pytest.approx(0.5)
    assert found.mean_batch_rows == 16
    assert found.median_ms == pytest.approx(9)  # waiting and computing
