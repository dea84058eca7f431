"""Promises 2 and 3, and exactly one outcome per request: arrivals, exits, cancellations, deadlines, failures, budget
changes and the shutdown in any order, with the real core, scheduler and budget, under a virtual clock.

Hypothesis generates the sequence of events; the invariants are checked after each.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import inf

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.budget.controller import BudgetController
from service.budget.steering import MEGA
from service.engine.core import Core
from service.engine.costs import CostTable
from service.engine.lanes import Batch, BatchResult
from service.engine.rows import ENDED, Answer, Options, Request, Step, Told
from service.engine.scheduler import POLICIES, Scheduler
from service.errors import EngineDraining, EngineError, EngineTooLate
from service.runners.blocks import Block, RowState
from tests.service.simulation import COSTS_MFLOPS, FULL_MFLOPS
from tests.service.virtual import CLASS_NAMES, N_EXITS, curve

MAX_ROWS = 8
MAX_WAIT_S = 0.05
N_LANES = 2
STATE_BYTES = 64
NEVER = 2.0  # a confidence that no image reaches
COSTS = tuple(round(cost * MEGA) for cost in COSTS_MFLOPS)

OPTIONS = st.builds(
    lambda exit_, least, cap, deadline_s, steps: (exit_, least, cap, deadline_s, steps),
    st.none() | st.integers(1, N_EXITS),
    st.none() | st.floats(0, 1),
    st.just(inf) | st.floats(COSTS_MFLOPS[0], FULL_MFLOPS),
    st.just(inf) | st.floats(0, 0.1),
    st.booleans(),
)
BUDGETS = st.sampled_from([0.3, 0.4, 0.5, 0.7]).map(lambda share: share * FULL_MFLOPS) | st.floats(
    COSTS_MFLOPS[0], FULL_MFLOPS
)
HURRIED = st.sampled_from([0.005, 0.02, 0.08]).map(lambda deadline_s: (None, NEVER, inf, deadline_s, False))
SURENESS = st.lists(st.sampled_from([-8.0, -8.0, 0.0, 2.0, 8.0]), min_size=MAX_ROWS, max_size=MAX_ROWS)
PLAIN = (None, None, inf, inf, False)


@dataclass(eq=False)
class Client:
    """A request as its client sees it: its outcomes, and how often each stage was run for it."""

    request: Request
    allowance: int
    runs: Counter[int] = field(default_factory=Counter)
    told: list[Told] = field(default_factory=list)
    left: bool = False
    overtaken: int = 0  # batches picked before it after its maximum wait

    @property
    def outcomes(self) -> list[Told]:
        return [told for told in self.told if not isinstance(told, Step)]

    @property
    def is_live(self) -> bool:
        return self.request.state is not ENDED

    @property
    def is_over(self) -> bool:
        """Whether it has got its outcome, or its client has left."""
        return self.left or bool(self.outcomes)


class Books(RuleBasedStateMachine):
    """The life of a server. `running` are the lanes' batches; Hypothesis chooses which one finishes or fails."""

    @initialize(
        budget=BUDGETS,
        burst=st.sampled_from([0.5, 1.0, 3.7, 32.0]),
        steer=st.booleans(),
        policy=st.sampled_from(sorted(POLICIES)),
        fixed_s=st.sampled_from([0.0, 0.005]),
    )
    def start(self, budget: float, burst: float, steer: bool, policy: str, fixed_s: float) -> None:
        controller = BudgetController(curve(), COSTS_MFLOPS, budget, burst, steer)
        costs = CostTable([{1: fixed_s + 0.001, MAX_ROWS: fixed_s + 0.001 * MAX_ROWS}] * N_EXITS)
        scheduler: Scheduler[Request] = Scheduler(N_EXITS, MAX_ROWS, MAX_WAIT_S, costs, policy)
        self.core = Core(controller, scheduler, CLASS_NAMES)
        self.ledger = controller.ledger
        self.highest_cap = self.ledger.cap
        self.now_s = 100.0
        self.clients: list[Client] = []
        self.running: list[Batch] = []
        self.answers: list[tuple[int, int]] = []  # (spent, allowance), in order of answering
        self.n_refused = self.idle_spent = 0
        self.draining = False

    # --- events -------------------------------------------------------------------------------------------------

    @rule(wishes=st.lists(st.just(PLAIN) | HURRIED | OPTIONS, min_size=1, max_size=10))
    def arrive(self, wishes: list[tuple[int | None, float | None, float, float, bool]]) -> None:
        if self.draining:
            self.n_refused += len(wishes)
            return
        arrivals = []
        for exit_, least, cap, deadline_s, steps in wishes:
            options = Options(1, exit_, least, cap, self.now_s + deadline_s, steps)
            state = RowState(Block({"images": np.zeros((1, STATE_BYTES), np.uint8)}, 1), 0)
            client = Client(Request(None, self._deliver, options, state), self.ledger.allowance)
            client.request.token = client
            arrivals.append(client)
        self.clients += arrivals
        self.core.admit([client.request for client in arrivals], self.now_s)

    @precondition(lambda self: len(self.running) < N_LANES)
    @rule()
    def dispatch(self) -> None:
        waiting = {client for client in self.clients if self._waits(client)}
        batch = self.core.next_batch(self.now_s)
        self._tell()
        if batch is None:
            assert not waiting, "rows wait while a lane is idle"
            return
        assert 1 <= len(batch.rows) <= MAX_ROWS
        for row in batch.rows:
            client: Client = row.token
            waiting.discard(client)
            assert not client.is_over, "a stage runs for a row that has answered or left"
            client.runs[batch.stage] += 1
            assert client.runs[batch.stage] == 1 or (client.runs[batch.stage] == 2 and len(batch.rows) == 1)
            client.overtaken = 0
        for client in waiting:
            client.overtaken += self.now_s - client.request.queued_since_s >= MAX_WAIT_S
        n_idle = len(batch.states) - len(batch.rows)
        self.idle_spent += n_idle * (COSTS[batch.stage] - (0, *COSTS)[batch.stage])
        assert self.core.idle_spent == self.idle_spent, "a row ran that nobody is charged for"
        assert n_idle == 0 or not self.core.scheduler.policy.compact
        batch.started_s = self.now_s
        self.running.append(batch)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, N_LANES - 1), sureness=SURENESS)
    def finish(self, which: int, sureness: list[float]) -> None:
        batch = self.running.pop(which % len(self.running))
        n_rows = len(batch.rows)
        logits = np.zeros((n_rows, len(CLASS_NAMES)), np.float32)
        logits[:, 1] = sureness[:n_rows]
        n_run = len(batch.states)
        values = {} if batch.stage == N_EXITS - 1 else {"state": np.zeros((n_run, STATE_BYTES), np.uint8)}
        batch.states = ()
        batch.result = BatchResult(logits, Block(values, n_run), 0.0, [1] * n_rows, sureness[:n_rows], [0.5] * n_rows)
        batch.ended_s = self.now_s
        self.core.finish(batch, self.now_s)
        self._tell()
        going_on = [row for row in batch.rows if row.state is not ENDED]
        if going_on and self.core.scheduler.policy.compact:
            assert going_on[0].state.block.n_rows < 4 * len(going_on), "memory is kept for rows that have left"

    @rule(sureness=st.lists(SURENESS, min_size=1, max_size=6))
    def work(self, sureness: list[list[float]]) -> None:
        """Run several batches in a row, so that sequences reach late stages."""
        for batch_sureness in sureness:
            if len(self.running) < N_LANES:
                self.dispatch()
            if self.running:
                self.finish(0, batch_sureness)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, N_LANES - 1))
    def fail(self, which: int) -> None:
        batch = self.running.pop(which % len(self.running))
        batch.error, batch.ended_s = RuntimeError("device lost"), self.now_s
        self.core.finish(batch, self.now_s)
        self._tell()

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 1000))
    def leave(self, which: int) -> None:
        client = self.clients[which % len(self.clients)]
        if not client.is_over:
            client.left = True
            self.core.abandon(client.request)

    @rule(seconds=st.floats(0.001, 0.2))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.core.expire(self.now_s)
        self._tell()

    @rule(budget=BUDGETS)
    def set_budget(self, budget: float) -> None:
        self.core.budget.set(budget)
        self.highest_cap = max(self.highest_cap, self.ledger.cap)

    @precondition(lambda self: len(self.clients) > 30)
    @rule()
    def drain(self) -> None:
        self.draining = True

    @precondition(lambda self: self.draining)
    @rule()
    def stop_at_once(self) -> None:
        """End the drain time: all remaining requests get an error."""
        self.core.fail_all(EngineDraining("stopped"))
        self.running.clear()
        self._tell()
        assert all(client.is_over for client in self.clients)

    def teardown(self) -> None:
        """After any sequence, all images in flight end if the engine continues to run."""
        if not hasattr(self, "core"):
            return
        while self.running or any(self._waits(client) for client in self.clients):
            while len(self.running) < N_LANES and any(self._waits(client) for client in self.clients):
                self.dispatch()
            self.now_s += 0.01
            self.wait(0.001)
            self.finish(0, [8.0, -8.0] * MAX_ROWS)
            self.books_balance()
        assert all(client.is_over for client in self.clients), "a row waits for ever"
        assert self.ledger.reserved == 0
        assert self._state_bytes() == 0
        self.no_window_of_answers_overspends()

    # --- invariants ---------------------------------------------------------------------------------------------

    @invariant()
    def everybody_hears_once_and_no_more(self) -> None:
        for client in self.clients:
            assert len(client.outcomes) <= 1
            steps = [told.exit for told in client.told if isinstance(told, Step)]
            assert steps == list(range(1, len(steps) + 1))

    @invariant()
    def books_balance(self) -> None:
        core = self.core
        kinds = Counter(type(outcome) for client in self.clients for outcome in client.outcomes)
        n_answered, n_late = kinds.pop(Answer, 0), kinds.pop(EngineTooLate, 0)
        assert (core.n_answered, core.n_late, core.n_failed) == (n_answered, n_late, sum(kinds.values()))
        in_flight = [client for client in self.clients if client.is_live]
        submitted = len(self.clients) + self.n_refused
        refused = self.n_refused + n_late
        assert submitted == core.n_answered + refused + core.n_abandoned + core.n_failed + len(in_flight)
        assert core.n_ended + len(in_flight) == len(self.clients)
        assert self.ledger.answered == core.n_answered

    @invariant()
    def the_ledger_is_the_sum_over_the_answers(self) -> None:
        assert self.ledger.spent_answered == sum(spent for spent, _ in self.answers)
        assert 0 <= self.ledger.reserved <= self.ledger.settled <= self.highest_cap

    @invariant()
    def no_window_of_answers_overspends(self) -> None:
        worst = current = 0
        for spent, allowance in self.answers:
            current = max(0, current + spent - allowance)
            worst = max(worst, current)
        assert worst <= self.highest_cap

    @invariant()
    def nobody_is_overtaken_for_ever(self) -> None:
        n_live = sum(client.is_live for client in self.clients)
        for client in self.clients:
            assert client.overtaken <= 2 * max(1, n_live) * N_EXITS, "a row waits for ever"

    @invariant()
    def state_is_kept_for_rows_in_flight_alone(self) -> None:
        """A row in flight keeps at most one batch's block alive; its size is checked when the batch ends."""
        assert self._state_bytes() <= MAX_ROWS * STATE_BYTES * sum(client.is_live for client in self.clients)

    # ------------------------------------------------------------------------------------------------------------

    def _waits(self, client: Client) -> bool:
        return client.is_live and not self._runs(client) and not client.is_over

    def _runs(self, client: Client) -> bool:
        return any(client.request in batch.rows for batch in self.running)

    def _state_bytes(self) -> int:
        return sum(block.bytes for block in {client.request.state.block for client in self.clients})

    def _tell(self) -> None:
        for sink, told in self.core.outbox.items():
            sink(told)
        self.core.outbox.clear()

    def _deliver(self, told: list[tuple[Client, Told]]) -> None:
        for client, item in told:
            assert not client.left, "told although it has left"
            client.told.append(item)
            if isinstance(item, Answer):
                spent = round(item.mflops * MEGA)
                self.answers.append((spent, client.allowance))
                self._charged_what_ran(client, item)
            else:
                assert isinstance(item, Step | EngineError)

    def _charged_what_ran(self, client: Client, answer: Answer) -> None:
        """An answer is charged for all stages run for it, including one that ran in vain past its deadline."""
        n_stages = len(client.runs)
        assert round(answer.mflops * MEGA) == COSTS[n_stages - 1]
        assert sorted(client.runs) == list(range(n_stages))
        assert n_stages == answer.exit or (answer.reason == "deadline" and n_stages == answer.exit + 1)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
