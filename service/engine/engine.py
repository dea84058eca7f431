"""The engine: takes images, runs them stage by stage, and answers each at the exit where it leaves.

One thread (`service.engine.loop`) owns the scheduler, the budget and every row (`service.engine.core`). Other threads
send it messages through one inbox, so the only locks are those of admission and of the thread's start and end. Lanes
run the batches.

Every request ends in exactly one way: submitted = answered + refused + abandoned + failed + in flight.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from math import inf
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.scores import Score
from service.budget.controller import BudgetController
from service.budget.degrade import Degrade
from service.budget.state import BudgetState
from service.budget.steering import MEGA
from service.engine.admission import Admission
from service.engine.core import Core
from service.engine.costs import HOST_BATCH_S, CostTable
from service.engine.guard import HANG_S
from service.engine.inbox import Abandon, Wake
from service.engine.loop import Loop
from service.engine.observer import EngineStats, Observer
from service.engine.outbox import resolve
from service.engine.rows import PLAIN, Answer, Options, Request, Sink, requests_for
from service.engine.scheduler import Scheduler
from service.errors import EngineDraining, EngineError, EngineOverloaded
from service.runners.base import Runner, RunnerError, canvas_px_of, first_states_of

T = TypeVar("T")


class Engine:
    """See the module; `service.assembly.build_engine` makes one from a bundle.

    Args:
        runner: runs the stages.
        budget: decides which images go on; owned by the engine from now on.
        scheduler: for the runner's number of stages; owned by the engine from now on.
        score: the exit score that the budget's frontier was made with.
        class_names: by class id.
        max_in_flight_rows: images in flight at once, at most; `submit` refuses more.
        exits: False runs every image to the last exit, as a network without exits would (for comparison).
        observer: notified of batches and answers.
        max_queue_s: predicted wait beyond which `submit` refuses as well.
        latency_s: target for the 95th percentile of latency; under load, the budget is lowered to meet it (`Degrade`).
        hang_s: how long a batch may run before its images are run again on another lane; see `Guard`.
        clock: seconds, also for deadlines; `time.perf_counter` except in tests.
    """

    def __init__(
        self,
        runner: Runner,
        budget: BudgetController,
        scheduler: Scheduler[Request],
        score: Score,
        class_names: Sequence[str],
        max_in_flight_rows: int = 1024,
        exits: bool = True,
        observer: Observer | None = None,
        max_queue_s: float = inf,
        latency_s: float | None = None,
        hang_s: float = HANG_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.stage_seconds: Sequence[dict[int, float]] = ()  # by batch rows, per stage; measured by `start`
        self._runner, self._first_states = runner, first_states_of(runner)
        self._admission = Admission(max_in_flight_rows)
        self._core = Core(budget, scheduler, class_names, exits, observer)
        self._degrade = Degrade(budget, max_in_flight_rows)
        self._degrade.set(budget.working_mflops, latency_s, clock())
        self._loop = Loop(self._core, runner, score, self._admission, self._degrade, max_queue_s, hang_s, clock)

    # --- any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Warm up every stage, then take requests. Takes about a second; call it once.

        Raises:
            RunnerError: a stage cannot run.
        """
        scheduler = self._core.scheduler
        self.stage_seconds = [dict(seconds) for seconds in self._runner.warm_up()]
        scheduler.costs = CostTable(self.stage_seconds, HOST_BATCH_S)
        scheduler.limits.limit(self._runner.max_rows)  # memory may allow fewer than configured
        self._loop.start(self.stage_seconds, scheduler.max_rows)

    @property
    def n_lanes(self) -> int:
        return self._runner.n_lanes

    @property
    def max_rows(self) -> int:
        """Rows of the largest batch."""
        return self._core.scheduler.max_rows

    @property
    def canvas_px(self) -> int:
        """The largest side of images that are not of the network's size; 0 if only the network's size is accepted."""
        return canvas_px_of(self._runner)

    @property
    def is_alive(self) -> bool:
        """True from `start` until the engine has stopped or broken down."""
        return self._loop.owns

    @property
    def trouble(self) -> str | None:
        """Why no image can be answered at the moment; None while the stages can run."""
        return self._loop.trouble

    @property
    def broken(self) -> "Future[EngineError]":
        """Resolves if the engine breaks down, with the error that every request in flight received."""
        return self._loop.broken

    @property
    def room(self) -> tuple[int, float]:
        """How many images may be in flight at the moment, and the predicted wait that each of them adds, in seconds."""
        return self._admission.room_rows, self._admission.row_s

    @property
    def has_room(self) -> bool:
        """Whether fewer images are in flight than may be; if not, `submit` refuses."""
        return not self._admission.is_full

    def overload(self) -> EngineOverloaded:
        """The error for a request that is refused before it is submitted; it is not counted."""
        return self._admission.overload()

    def submit(self, image: NDArray[np.uint8], options: Options = PLAIN) -> "Future[Answer]":
        """Classify one image; cancelling the future abandons it.

        Args:
            image: uint8 [H, W, 3] of the network's size; it must not be changed before the future is done.
            options: see `Options`.

        Returns:
            a future of the answer; if the image fails, of an EngineError.

        Raises:
            ValueError: the image is not what the network takes.
            EngineOverloaded: too many images are in flight.
            EngineDraining: the engine has not started, or is stopping.
            EngineError: it has broken down.
        """
        future: Future[Answer] = Future()
        request = self.submit_to(resolve, future, image, options)
        future.add_done_callback(lambda done: self.abandon(request) if done.cancelled() else None)
        return future

    def submit_to(
        self, sink: Sink, token: Any, image: NDArray[np.uint8], options: Options = PLAIN, flush: bool = True
    ) -> Request:
        """Classify one image; `sink` receives (token, outcome), in one call with the other outcomes of its batch.

        An event loop is thus woken once per batch, not once per image. Raises as `submit` does. The request returned
        is only for `abandon`.

        Args:
            flush: False if more images follow immediately, and then a call of `flush`: the engine's thread is woken
                once for all of them, and they can run together.
        """
        try:
            state = self._runner.first_state(image)
        except RunnerError:  # the runner has no place left for the image
            raise self._admission.refuse() from None
        request = Request(token, sink, options, state)
        self._admission.enter(request)
        if flush:
            self.flush()
        return request

    def submit_all(
        self,
        sink: Sink,
        tokens: Sequence[Any],
        images: NDArray[np.uint8],
        which: Sequence[int],
        options: Options = PLAIN,
    ) -> list[Request | EngineError]:
        """Classify images of one array as `submit_to` does, at a fraction of the cost per image.

        Args:
            tokens: one per image to classify.
            images: uint8 [any, H, W, 3] of the network's size; not to be changed until all outcomes are delivered.
            which: for each token, the index of its image.

        Returns:
            for each token its request, or the error with which it was refused. Call `flush` afterwards.

        Raises:
            ValueError: the images are not what the network takes.
        """
        n_free = self._admission.n_free  # images without room must not take a place in the runner
        try:
            states = self._first_states(images, which[:n_free]) if n_free else ()
        except RunnerError:  # the runner has too few places left
            states = ()
        requests = requests_for(tokens, sink, options, states)
        n_in = self._admission.enter_all(requests)
        return [*requests[:n_in], *(self._admission.refuse() for _ in tokens[n_in:])]

    def flush(self) -> None:
        """Wake the engine's thread for submitted images, if it has asked for that."""
        if self._admission.is_to_wake():
            self._loop.inbox.put(Wake())

    def abandon(self, request: Request) -> None:
        """Give up a request: it runs no further stage and, unless its outcome was delivered before, gets none."""
        self._loop.inbox.put(Abandon(request))

    def ask(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function on the engine's thread, between batches. Waiting for it on that thread would deadlock."""
        return self._loop.ask(function)

    def took(self, seconds: float) -> None:
        """Report the latency of an answer, counted from the last byte of its request; input of `latency_s`."""
        self._degrade.took(seconds)

    def set_budget(self, budget_mflops: float, latency_s: float | None = None) -> BudgetState:
        """Set the average mflops per image for images admitted from now on; returns the new state.

        Args:
            latency_s: see `Engine`; None removes the target.

        Raises:
            ValueError: the budget is out of the network's range, which the message names; or `latency_s` is not a
                positive, finite number.
        """

        def change() -> BudgetState:
            self._degrade.set(budget_mflops, latency_s, self.clock())
            return self._budget_state()

        return self.ask(change).result()

    def budget_state(self) -> BudgetState:
        """Budget, operating point and spending: a consistent snapshot taken between batches (well under 1 ms)."""
        return self.ask(self._budget_state).result()

    def stats(self) -> EngineStats:
        """Counts: a consistent snapshot taken between batches (well under 1 ms)."""
        return self.ask(self._stats).result()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, answer those accepted, and stop. Requests not answered in time fail.

        May be called repeatedly, from any thread except the engine's own.

        Returns:
            True if every accepted request got its outcome in time.
        """
        why = EngineDraining("the engine is stopping and takes no new requests")
        in_time = self._admission.close_and_wait(why, timeout_s)
        self._loop.stop()
        return in_time

    def _budget_state(self) -> BudgetState:
        return replace(self._core.budget.state(), latency=self._degrade.state(self.clock()))

    def _stats(self) -> EngineStats:
        core = self._core
        submitted, refused, in_flight = self._admission.counts()
        return EngineStats(
            submitted=submitted,
            answered=core.n_answered,
            refused=refused + core.n_late,
            abandoned=core.n_abandoned,
            failed=core.n_failed,
            in_flight_rows=in_flight - (core.n_ended - self._loop.n_delivered),
            queued_rows=tuple(core.scheduler.queued_rows(stage) for stage in range(self._runner.n_stages)),
            running_batches=len(self._loop.guard.running),
            failed_batches=self._loop.guard.n_failed,
            hung_batches=self._loop.guard.n_hung,
            max_batch_rows=tuple(core.scheduler.limits.rows),
            room_rows=self._admission.room_rows,
            predicted_wait_s=in_flight * self._loop.pace.row_s,
            exits=dict(core.exits),
            idle_mflops=core.idle_spent / MEGA,
            latency_limited_s=self._degrade.limited_total_s,
        )
