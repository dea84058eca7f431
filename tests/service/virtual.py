"""The engine's core under a virtual clock: the real ledger and queues, and stages with prescribed logits."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.exits import confidence
from models.frontier import Frontier
from service.budget.controller import BudgetController
from service.engine.core import Core
from service.engine.lanes import Batch, BatchResult
from service.engine.observer import Observer
from service.engine.rows import Answer, Options, Request, Step, Told
from service.engine.scheduler import Scheduler
from service.errors import EngineError
from service.runners.blocks import Block, RowState
from tests.service.simulation import COSTS_MFLOPS, FULL_MFLOPS, frontier

CLASS_NAMES = ["ant", "bee", "cat"]
N_EXITS = len(COSTS_MFLOPS)


@dataclass
class World:
    """Runs images whose top logit grows by 1 at each exit, in batches that take `stage_s` each."""

    core: Core
    stage_s: float = 0.010
    now_s: float = 100.0
    told: list[tuple[Any, Told]] = field(default_factory=list)

    def admit(self, token: Any, options: Options) -> Request:
        request = Request(token, self._sink, options, RowState(Block({"images": np.zeros((1, 1))}, 1), 0))
        self.core.admit([request], self.now_s)
        return request

    def start(self) -> Batch | None:
        batch = self.core.next_batch(self.now_s)
        if batch is not None:
            batch.started_s = self.now_s
        return batch

    def finish(self, batch: Batch) -> None:
        self.ran(batch)
        self.core.finish(batch, self.now_s)
        self.deliver()

    def ran(self, batch: Batch) -> None:
        n_rows = len(batch.rows)
        logits = np.zeros((n_rows, len(CLASS_NAMES)), np.float32)
        logits[:, 1] = 1.0 + batch.stage  # confidence (softmax maximum): .58, .79, .91, .96, .99, .995
        sure = confidence(logits).tolist()
        block = Block({"state": np.zeros((n_rows, 1))}, n_rows)
        batch.result = BatchResult(logits, block, 0.0, [1] * n_rows, [float(batch.stage)] * n_rows, sure)
        batch.ended_s = self.now_s

    def run(self) -> None:
        """Run until all queues are empty; deadlines expire exactly on time."""
        while (batch := self.start()) is not None:
            done_s = self.now_s + self.stage_s
            self.wait_until(done_s)
            self.finish(batch)

    def wait_until(self, then_s: float) -> None:
        while self.core.deadlines.next_s <= then_s:
            self.now_s = self.core.deadlines.next_s
            self.core.expire(self.now_s)
            self.deliver()
        self.now_s = then_s

    def deliver(self) -> None:
        for sink, told in self.core.outbox.items():
            sink(told)
        self.core.outbox.clear()

    def _sink(self, told: list[tuple[Any, Told]]) -> None:
        self.told += told

    def outcome(self, token: Any) -> Answer | EngineError:
        [found] = [item for its, item in self.told if its == token and not isinstance(item, Step)]
        assert isinstance(found, Answer | EngineError)
        return found

    def answer(self, token: Any) -> Answer:
        answer = self.outcome(token)
        assert isinstance(answer, Answer), answer
        return answer

    def steps(self, token: Any) -> list[Step]:
        return [item for its, item in self.told if its == token and isinstance(item, Step)]


@functools.cache
def curve() -> Frontier:
    return frontier()


def world(
    budget_mflops: float = FULL_MFLOPS,
    burst_images: float = 1000.0,
    exits: bool = True,
    max_rows: int = 32,
    observer: Observer | None = None,
) -> World:
    budget = BudgetController(curve(), COSTS_MFLOPS, budget_mflops, burst_images, steer=False)
    return World(Core(budget, Scheduler(N_EXITS, max_rows), CLASS_NAMES, exits, observer))


def spent_is_what_answers_say(world: World, tokens: Sequence[Any]) -> bool:
    total = sum(round(world.answer(token).mflops * 1e6) for token in tokens)
    return world.core.budget.ledger.spent_answered == total and world.core.budget.ledger.reserved == 0
