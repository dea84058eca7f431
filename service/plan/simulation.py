"""The engine under a virtual clock: the real core, scheduler and budget; stages and host are times from a table.

A discrete-event simulation of what `service.engine.loop` does with threads: arrivals, batches that end, and the host's
work for both. The same seed gives the same run.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import cycle
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.frontier import Frontier
from service.assembly import default_burst_images
from service.budget.controller import BudgetController
from service.budget.ledger import MANY_IN_FLIGHT, window_for
from service.engine.core import Core
from service.engine.costs import HOST_BATCH_S, CostTable
from service.engine.lanes import Batch, BatchResult
from service.engine.rows import Answer, Options, Request, Told
from service.engine.scheduler import Scheduler
from service.plan.stage_times import StageTimes
from service.runners.base import NO_LOGITS
from service.runners.blocks import Block, RowState, lie_side_by_side

NOTHING = Block({}, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """What a simulation needs of a network: the scores of held-out images at every exit, and the exits' costs."""

    scores: NDArray[Any]  # [images, exits], by the score that the server uses
    correct: NDArray[np.bool_]  # [images, exits]
    costs_mflops: Sequence[float]  # cumulative, by exit
    frontier: Frontier


@dataclass(frozen=True, slots=True)
class Setup:
    """A server's settings, and the machine on which it runs."""

    budget_mflops: float
    n_lanes: int
    n_cores: int
    max_rows: int = 32
    policy: str = "default"
    burst_images: float | None = None  # of the ledger; None: the server's default
    steer: bool = True
    max_wait_s: float = 0.05
    http_image_s: float = 0.0  # CPU time per image outside the engine
    max_in_flight: int = MANY_IN_FLIGHT


@dataclass(slots=True)
class Record:
    """The results: images in the order of their answers, batches in the order in which they ended."""

    row: list[int] = field(default_factory=list)  # of `Network.scores`
    came_s: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    exit: list[int] = field(default_factory=list)  # from 1
    reason: list[str] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)  # multiply-adds
    batch_rows: list[list[int]] = field(default_factory=list)  # by stage


class _Image(NamedTuple):
    row: int  # of `Network.scores`
    came_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _HostWork:
    """The host's work for an image that has arrived, or for batches that have run."""

    seconds: float
    done: Callable[[], None]


class Simulation:
    """One replica: lanes, a host thread (Python runs one at a time), and cores that they share.

    If stages run on the CPU, pieces of work in progress share the cores evenly: with more pieces than cores, each is
    slower by that ratio. A batch that runs alone is faster than the table says (`StageTimes.alone_speed`), and batch
    times vary around the median of their stage (`StageTimes.spread`). A host that wakes while lanes hold all cores
    waits for one (`StageTimes.wake_seconds`), at most until a lane is idle.

    Args:
        network, times, setup: see their classes.
        seed: for drawing held-out images, batch times and wake-up delays.
    """

    def __init__(self, network: Network, times: StageTimes, setup: Setup, seed: int = 0) -> None:
        burst_images = setup.burst_images
        if burst_images is None:
            burst_images = default_burst_images(setup.n_lanes, setup.max_rows)
        self.budget = BudgetController(
            network.frontier,
            network.costs_mflops,
            setup.budget_mflops,
            burst_images,
            setup.steer,
            window_for(setup.max_in_flight),
        )
        self.record = Record(batch_rows=[[] for _ in network.costs_mflops])
        self._times, self._setup, self.now_s = times, setup, 0.0
        costs = CostTable(times.stage_seconds, HOST_BATCH_S)  # as after warm-up; updated by the batches that run
        scheduler: Scheduler[Request] = Scheduler(
            len(times.stage_seconds), setup.max_rows, setup.max_wait_s, costs, setup.policy
        )
        self._core = Core(self.budget, scheduler, ("",))
        self._scores: list[list[float]] = network.scores.tolist()
        self._rng = np.random.default_rng(seed)
        draw = np.random.default_rng((seed, 1)).choice
        self._wakes, self._spread = (cycle(draw(of, 8192).tolist()) for of in (times.wake_seconds, times.spread))
        self._rows: Iterator[int] = iter(())
        # A heap of work in progress, by the value of `_done_s` at which each piece is done.
        self._progress: list[tuple[float, int, Callable[[], None]]] = []
        self._done_s = 0.0  # work done since the start on a piece that was always in progress
        self._host_wakes_s = inf  # when the host gets the core for which it waits
        self._n_begun = 0
        self._host: deque[_HostWork] = deque()  # the first is in progress
        self._handed_over: deque[Batch] = deque()  # batches that no lane has begun
        self._ran: list[Batch] = []  # not yet taken back
        self._n_out = 0  # batches with the lanes, or not yet taken back
        self._n_running = 0
        self._arrived: list[Request] = []  # not yet admitted
        self._closed_loop = 0  # images yet to arrive, each when another has been answered

    def run(self, arrivals: Iterable[float]) -> Record:
        """Let images arrive at these times (seconds, ascending), and run until all are answered."""
        coming = iter(arrivals)
        next_s = next(coming, inf)
        while True:
            speed = self._speed
            done_at = self.now_s + (self._progress[0][0] - self._done_s) / speed if self._progress else inf
            now_s = min(done_at, self._host_wakes_s, next_s)
            if now_s == inf:
                return self.record
            if now_s == done_at:
                self.now_s = now_s
                self._done_s, _, done = heappop(self._progress)
                done()
                continue
            self._done_s += (now_s - self.now_s) * speed
            self.now_s = now_s
            if now_s == self._host_wakes_s:
                self._host_wakes_s = inf
                self._begin_host()
            else:
                self._come()
                next_s = next(coming, inf)

    def saturate(self, n_images: int, n_in_flight: int) -> Record:
        """Keep `n_in_flight` images in flight until `n_images` have been sent, and run until all are answered."""
        n_first = min(n_images, n_in_flight)
        self._closed_loop = n_images - n_first
        return self.run([self.now_s] * n_first)

    @property
    def _speed(self) -> float:
        """The speed of every piece of work in progress; 1 is that of the table."""
        n_cores, n_pieces = self._setup.n_cores, len(self._progress)
        if not self._times.lanes_take_cores or not n_pieces:
            return 1.0
        if n_pieces > n_cores:
            return n_cores / n_pieces
        n_most = min(self._setup.n_lanes, n_cores)  # lanes that can run without waiting for a core, as when measured
        if n_pieces >= n_most:
            return 1.0
        return 1.0 + (self._times.alone_speed - 1.0) * (n_most - n_pieces) / (n_most - 1)

    def _begin(self, seconds: float, done: Callable[[], None]) -> None:
        self._n_begun += 1  # breaks ties by age
        heappush(self._progress, (self._done_s + seconds, self._n_begun, done))

    # --- the host -----------------------------------------------------------------------------------------------

    def _come(self) -> None:
        row = next(self._rows, None)
        if row is None:
            self._rows = iter(self._rng.integers(0, len(self._scores), 4096).tolist())
            row = next(self._rows)
        request = Request(_Image(row, self.now_s), self._deliver, Options(), RowState(NOTHING, 0))

        def arrive() -> None:
            self._arrived.append(request)
            if self._n_out < self._core.batches_out(self._setup.n_lanes):
                self._dispatch()

        self._ask_host(self._times.host_image_seconds + self._setup.http_image_s, arrive)

    def _ask_host(self, seconds: float, done: Callable[[], None]) -> None:
        if not seconds:
            done()
            return
        self._host.append(_HostWork(seconds, done))
        if len(self._host) > 1:
            return
        if self._cores_are_held:
            self._host_wakes_s = self.now_s + next(self._wakes)
        else:
            self._begin_host()

    @property
    def _cores_are_held(self) -> bool:
        return self._times.lanes_take_cores and self._n_running >= self._setup.n_cores

    def _begin_host(self) -> None:
        self._begin(self._host[0].seconds, self._host_is_done)

    def _host_is_done(self) -> None:
        self._host[0].done()
        self._host.popleft()  # after `done`, so that host work which that adds queues up behind it
        if self._host:
            self._begin_host()

    # --- the engine's thread, as `service.engine.loop` ----------------------------------------------------------

    def _take_arrivals(self) -> None:
        arrived, self._arrived = self._arrived, []
        self._core.admit(arrived, self.now_s)

    def _take_back(self, batches: Sequence[Batch]) -> None:
        self._n_out -= len(batches)
        self._take_arrivals()
        for batch in batches:
            self._core.finish(batch, self.now_s)
        self._dispatch()
        for sink, outcomes in self._core.outbox.items():
            sink(outcomes)
        self._core.outbox.clear()

    def _dispatch(self) -> None:
        self._take_arrivals()
        while self._n_out < self._core.batches_out(self._setup.n_lanes):
            batch = self._core.next_batch(self.now_s)
            if batch is None:
                break
            self._n_out += 1
            self._handed_over.append(batch)
        self._run_lanes()

    def _deliver(self, outcomes: list[tuple[Any, Told]]) -> None:
        record = self.record
        for image, answer in outcomes:
            if not isinstance(answer, Answer):
                raise TypeError(f"a simulated image got {answer!r}. This is a bug.")
            record.row.append(image.row)
            record.came_s.append(image.came_s)
            record.answered_s.append(self.now_s)
            record.exit.append(answer.exit)
            record.reason.append(answer.reason)
            record.spent.append(self.budget.costs[answer.exit - 1])
        for _ in range(min(self._closed_loop, len(outcomes))):
            self._closed_loop -= 1
            self._come()

    # --- lanes --------------------------------------------------------------------------------------------------

    def _run_lanes(self) -> None:
        while self._handed_over and self._n_running < self._setup.n_lanes:
            self._n_running += 1
            self._start(self._handed_over.popleft())

    def _start(self, batch: Batch) -> None:
        batch.started_s = self.now_s
        stage, n_run = batch.stage, len(batch.states)
        copy_s = 0.0 if lie_side_by_side(batch.states) else n_run * self._times.copy_row_seconds[stage]

        def end() -> None:
            self._n_running -= 1
            batch.ended_s = self.now_s
            scores = [self._scores[row.token.row][stage] for row in batch.rows]
            batch.result = BatchResult(NO_LOGITS, Block({}, n_run), copy_s, [0] * len(scores), scores, scores)
            self.record.batch_rows[stage].append(len(scores))
            self._ran.append(batch)
            self._run_lanes()
            if self._host_wakes_s < inf and not self._cores_are_held:
                self._host_wakes_s = self.now_s
            if not (self._handed_over and self._core.is_behind(self._setup.n_lanes)):
                ran, self._ran = self._ran, []
                self._ask_host(len(ran) * self._times.host_batch_seconds, lambda: self._take_back(ran))

        self._begin(self._times.seconds(stage, n_run) * next(self._spread) + copy_s, end)
