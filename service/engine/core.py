"""The engine's logic: which rows are admitted, run, leave and go on. It starts no threads and never waits.

The caller passes the time, runs the batches that it is given, and returns them.
"""

import logging
from collections import Counter, deque
from collections.abc import Sequence
from math import inf
from typing import Any, Final

from service.budget.controller import BudgetController, Reason
from service.budget.steering import MEGA
from service.engine import wishes
from service.engine.answering import Verdict, answers_of, late_answer
from service.engine.lanes import Batch, BatchResult
from service.engine.observer import Observer
from service.engine.outbox import turn_away
from service.engine.rows import ENDED, Answer, Head, Request, Sink, Told
from service.engine.scheduler import Scheduler
from service.errors import EngineError, EngineTooLate
from service.runners.blocks import Block, keep, lie_side_by_side

logger = logging.getLogger(__name__)

BEHIND_ROWS: Final = 32  # waiting rows per lane, if a full batch is smaller


class Core:
    """Owns every row in flight: admits, dispatches, ends or requeues it.

    Attributes:
        budget, scheduler: owned by this object.
        outbox: steps and outcomes not yet delivered, by sink; `deliver` empties it.
        deadlines: of requests that have one; call `expire` when the next is due.
        n_ended, n_answered, n_abandoned, n_failed, n_late: requests, since the start; the first is the sum of the
            others. Late ones were refused because their deadline passed before they could run.
        exits: answers by exit (from 1) and reason.
        idle_spent: multiply-adds run for rows that had been answered: see `Policy.compact`.
    """

    def __init__(
        self,
        budget: BudgetController,
        scheduler: Scheduler[Request],
        class_names: Sequence[str],
        exits: bool = True,
        observer: Observer | None = None,
    ) -> None:
        self.budget = budget
        self.scheduler = scheduler
        self.outbox: dict[Sink, list[tuple[Any, Told]]] = {}
        self.deadlines = wishes.Deadlines()
        self.n_answered = self.n_abandoned = self.n_failed = self.n_late = 0
        self.exits: Counter[tuple[int, Reason]] = Counter()
        self.idle_spent = 0
        self._class_names = list(class_names)
        self._exits_on = exits
        self._observer = observer
        self._n_wishing = 0  # rows in flight with non-plain options
        self._n_gone = 0  # abandoned rows not yet back from their batch
        self._out: set[Batch] = set()  # batches handed out and not yet returned
        self._retries: deque[tuple[int, Request]] = deque()  # (stage, row) of failed batches, to rerun alone
        self._is_retrys_turn = False  # retries go first every other time

    @property
    def n_ended(self) -> int:
        return self.n_answered + self.n_abandoned + self.n_failed + self.n_late

    def admit(self, requests: list[Request], now_s: float) -> None:
        if not requests:
            return
        account = self.budget.admit(len(requests))
        for request in requests:
            request.account, request.admitted_s = account, now_s
            if not request.options.is_plain:
                self._n_wishing += 1
                if request.options.deadline_s < inf:
                    self.deadlines.add(request)
        self._queue(requests, 0, now_s)

    def abandon(self, request: Request) -> None:
        """End a request whose client has left: at once if it waits, when its batch returns if it runs."""
        if request.abandoned or request.state is ENDED:
            return
        request.abandoned = True
        stage = self.scheduler.drop(request)
        if stage is None:
            self._n_gone += 1
        else:
            self._end(request, stage, False, None)

    def expire(self, now_s: float) -> None:
        """Answer requests whose deadline has come from the last head that they passed, whether they wait or run.

        A request that waits for its first stage is refused; one that runs it is answered when the batch returns.
        """
        for row in self.deadlines.pop_due(now_s):
            if row.abandoned:
                continue
            stage = self.scheduler.drop(row)
            if row.head is not None:
                row.abandoned = True
                self._n_gone += stage is None
                self._answer_from(row, row.head, stage is None, now_s)
            elif stage is not None:
                self._end(row, stage, False, EngineTooLate())

    def is_behind(self, n_lanes: int) -> bool:
        """Whether so many images wait for every lane that deciding one batch later delays no answer noticeably."""
        return len(self.scheduler) >= n_lanes * max(self.scheduler.max_rows, BEHIND_ROWS)

    def batches_out(self, n_lanes: int) -> int:
        """How many batches the lanes should have, including running ones, so that no lane waits for a decision."""
        return 2 * n_lanes + ((n_lanes + 1) // 2 if self.is_behind(n_lanes) else 0)

    def next_batch(self, now_s: float) -> Batch | None:
        """Take the next batch to run, for which its rows are charged; None if nothing waits.

        Retried rows take turns with other batches: a large failed batch becomes as many batches of one row as it had
        rows, and other rows must not wait for all of them.
        """
        self._is_retrys_turn = not self._is_retrys_turn
        batch = self._retry() if self._is_retrys_turn else None
        batch = batch or self._pick(now_s) or self._retry()
        if batch is not None:
            self._out.add(batch)
        return batch

    def _pick(self, now_s: float) -> Batch | None:
        if (picked := self.scheduler.pick(now_s)) is None:
            return None
        batch = Batch(*picked)
        if not self.scheduler.policy.compact:
            before = self.budget.costs[batch.stage - 1] if batch.stage else 0
            self.idle_spent += batch.run_whole_block() * (self.budget.costs[batch.stage] - before)
        return batch

    def _retry(self) -> Batch | None:
        while self._retries:
            stage, row = self._retries.popleft()
            if not row.abandoned:
                return Batch(stage, [row])
            self._end_abandoned(row, stage)
        return None

    def finish(self, batch: Batch, now_s: float) -> None:
        """Take back a batch that has run or failed: each of its rows leaves, goes on, or is retried."""
        self.budget.refresh()
        result, seconds = batch.result, batch.ended_s - batch.started_s
        for row in batch.rows:
            row.compute_s += seconds
        if result is None:
            self.scheduler.limits.failed(batch.stage, len(batch.rows), batch.error)
            self.fail(batch, f"failed: {batch.error}", now_s)
            return
        self.scheduler.limits.ran(batch.stage, len(batch.rows))
        self.scheduler.costs.ran(batch.stage, result.block.n_rows, seconds, result.copy_s)
        if self._observer is not None:
            waits = [batch.started_s - row.queued_since_s for row in batch.rows]
            self._observer.batch_ran(batch.stage + 1, seconds, waits)
        reasons = self._reasons(batch, result, now_s)
        going_on = [i for i, reason in enumerate(reasons) if reason is None]
        if going_on:
            self._go_on(batch, result.block, going_on, now_s)
        if len(going_on) < len(reasons):
            self._answer(batch, result, reasons, now_s)
        self._out.remove(batch)  # last: if anything above raises, `fail_all` still finds its rows

    def fail(self, batch: Batch, what: str, now_s: float) -> None:
        """Run the rows of a failed batch once more, each alone, as one of them may have been the cause."""
        self._out.discard(batch)
        logger.error("stage %d of %d images %s", batch.stage + 1, len(batch.rows), what)
        for row in batch.rows:
            if row.abandoned:
                self._end_abandoned(row, batch.stage)
            elif row.retried_stage == batch.stage:
                self._end(row, batch.stage, True, EngineError(f"stage {batch.stage + 1} {what}"))
            else:
                row.retried_stage, row.queued_since_s = batch.stage, now_s
                self._retries.append((batch.stage, row))

    def fail_all(self, error: EngineError) -> None:
        """End every request in flight with an error. Batches that are still running must not be passed to `finish`."""
        ran = [*self._retries, *[(batch.stage, row) for batch in self._out for row in batch.rows]]
        waiting = self.scheduler.drop_all()
        self._retries.clear()
        self._out.clear()
        try:
            for stage, row in waiting:
                self._end(row, stage, False, error)
            for stage, row in ran:
                if row.abandoned:
                    self._end_abandoned(row, stage)
                elif row.state is not ENDED:
                    self._end(row, stage, True, error)
        finally:  # without the accounts, whose code may be what failed: no other reference to these rows is left
            self.n_failed += turn_away(self.outbox, [row for _, row in waiting + ran], error)

    def _queue(self, rows: list[Request], stage: int, now_s: float, joined: bool = False) -> None:
        for row in rows:
            row.queued_since_s = now_s
        hurry = self._n_wishing and any(not row.options.is_plain for row in rows)
        due_s = [row.options.deadline_s for row in rows] if hurry else None
        self.scheduler.add(rows, stage, now_s, joined, due_s)

    def _reasons(self, batch: Batch, result: BatchResult, now_s: float) -> list[Verdict]:
        rows, passed = batch.rows, batch.stage + 1
        scores = result.scores if self._exits_on else [wishes.NEVER_SURE] * len(rows)
        if not (self._n_wishing or self._n_gone):
            return [*self.budget.decide([row.account for row in rows], passed, scores)]
        reasons: list[Verdict] = [""] * len(rows)
        plain = [i for i, row in enumerate(rows) if row.options.is_plain and not row.abandoned]
        if plain:
            decided = self.budget.decide([rows[i].account for i in plain], passed, [scores[i] for i in plain])
            for i, reason in zip(plain, decided, strict=True):
                reasons[i] = reason
        for i, row in enumerate(rows):
            if row.abandoned:
                self._end_abandoned(row, batch.stage)
            elif not row.options.is_plain:
                reasons[i] = self._decide_by_wishes(row, batch, result, i, now_s)
        return reasons

    def _go_on(self, batch: Batch, block: Block, indices: list[int], now_s: float) -> None:
        """Queue some of a batch's rows for the next stage."""
        rows = [batch.rows[i] for i in indices]
        if batch.stage == 0 and block.slots is not None:
            for row in rows:  # not earlier: a row whose batch failed or was given up needs its image for the retry
                row.state.begun()
        joined = False
        if not block.is_kept_in_slots:
            places = indices if batch.places is None else [batch.places[i] for i in indices]
            # Rows in slots are independent, whatever the policy: `keep` gives each its values outside the slot.
            apart = self.scheduler.policy.compact or block.slots is not None
            states = keep(block, places) if apart else block.states(places)
            for i, row in enumerate(rows):
                row.state = states[i]
            joined = lie_side_by_side(states)
        self._queue(rows, batch.stage + 1, now_s, joined)

    def _answer(self, batch: Batch, result: BatchResult, reasons: list[Verdict], now_s: float) -> None:
        """Answer those rows of a batch that leave."""
        mflops, with_steps = self.budget.costs[batch.stage] / MEGA, self._n_wishing > 0
        rows, answers = answers_of(batch, result, reasons, mflops, self._class_names, now_s, with_steps)
        if rows:
            self._end_answered(rows, answers)

    def _decide_by_wishes(self, row: Request, batch: Batch, result: BatchResult, i: int, now_s: float) -> Reason | None:
        score = result.scores[i] if self._exits_on else wishes.NEVER_SURE
        threshold = self.budget.thresholds[batch.stage]
        logits = result.logits[i].copy()  # a view would keep the whole batch alive
        mflops = self.budget.costs[batch.stage] / MEGA
        head = Head(batch.stage + 1, logits, result.classes[i], score, threshold, len(batch.rows), mflops)
        row.head = head
        reason = wishes.decide(self.budget, row, head, now_s)
        if reason is None and row.options.steps:
            self.outbox.setdefault(row.sink, []).append((row.token, wishes.step(row, head, self._class_names)))
        return reason

    def _answer_from(self, row: Request, head: Head, runs: bool, now_s: float) -> None:
        """Answer from a head passed before the deadline. A row that `runs` the next stage is charged for that, too."""
        mflops = self.budget.costs[head.exit] / MEGA if runs else head.mflops
        answer = late_answer(row, head, mflops, self._class_names, now_s)
        self.budget.settle([row.account], head.exit + 1, runs)
        self._end_answered([row], [answer])

    def _end_abandoned(self, row: Request, stage: int) -> None:
        """End an abandoned row whose batch has returned, unless its deadline had ended it before."""
        self._n_gone -= 1
        if row.state is not ENDED:
            self._end(row, stage, True, None)

    def _end_answered(self, rows: list[Request], answers: list[Answer]) -> None:
        """End requests answered at one exit. Their accounts were settled with the decision."""
        self.n_answered += len(rows)
        why = [answer.reason for answer in answers]
        for reason in dict.fromkeys(why):
            self.exits[answers[0].exit, reason] += why.count(reason)
        if self._n_wishing:
            self._n_wishing -= sum(not row.options.is_plain for row in rows)
        sink: Sink | None = None  # of the previous row: usually the same, and a look-up takes as long as the rest
        for i, row in enumerate(rows):
            row.state = ENDED
            if row.sink is not sink:
                sink = row.sink
                outcomes = self.outbox.setdefault(sink, [])
            outcomes.append((row.token, answers[i]))
        if self._observer is not None:
            self._observer.answered(answers)

    def _end(self, row: Request, stage: int, ran: bool, error: EngineError | None) -> None:
        """End a request with `error` or, if None, as abandoned. If it `ran`, it is charged for `stage`, too."""
        self.budget.settle([row.account], stage + 1, ran, answered=False)
        row.state = ENDED
        self._n_wishing -= not row.options.is_plain
        if error is None:
            self.n_abandoned += 1
            return
        if isinstance(error, EngineTooLate):
            self.n_late += 1
        else:
            self.n_failed += 1
        self.outbox.setdefault(row.sink, []).append((row.token, error))
