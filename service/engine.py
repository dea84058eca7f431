"""The engine: takes images, runs them stage by stage, and answers each at the exit where it leaves.

One thread owns the scheduler, the budget and every row (`service.core`); all others send it messages through one
inbox, so there is no lock to forget: one guards admission alone. Lanes run the batches. The loop is

    take arrivals and finished batches -> who leaves, who goes on -> dispatch to free lanes -> deliver the answers

Every request ends in exactly one way: submitted = answered + refused + abandoned + failed + in flight.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.budget import BudgetController, BudgetState
from service.core import Core
from service.inbox import Abandon, Call, Stop, Wake
from service.lanes import Batch, Lanes, Score
from service.observer import EngineStats, Observer
from service.rows import Answer, EngineDraining, EngineError, EngineOverloaded, Options, Request, Sink, Step, Told
from service.runners.base import Runner, fit_stage_time
from service.scheduler import Scheduler, ripe_rows

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Engine:
    """See the module; `service.assembly.build_engine` makes one from a bundle.

    Args:
        runner: runs the stages.
        budget: decides who goes on; owned by the engine from now on.
        scheduler: of as many stages; owned by the engine from now on.
        score: the exit score that the budget's frontier was made with.
        class_names: by class id.
        max_in_flight_rows: images held at once; beyond it `submit` refuses.
        lookahead_batches: batches handed to the lanes beyond those running, so that no lane waits for a decision; by
            default one a lane.
        exits: False runs every image to the last exit, as a network without exits would (for comparison).
        observer: told of batches and answers.
        clock: seconds, of deadlines too; `time.perf_counter` unless a test has its own.
    """

    def __init__(
        self,
        runner: Runner,
        budget: BudgetController,
        scheduler: Scheduler[Request],
        score: Score,
        class_names: Sequence[str],
        max_in_flight_rows: int = 1024,
        lookahead_batches: int | None = None,
        exits: bool = True,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.max_in_flight_rows = max_in_flight_rows
        self.stage_seconds: Sequence[dict[int, float]] = ()  # by batch rows, per stage; measured by `start`
        self._runner = runner
        self._inbox: SimpleQueue[Batch | Abandon | Call | Wake | Stop] = SimpleQueue()
        self._lanes = Lanes(runner, score, self._inbox.put)
        self._max_running = len(self._lanes) + (len(self._lanes) if lookahead_batches is None else lookahead_batches)
        self._thread = threading.Thread(target=self._work, name="exitserve-engine", daemon=True)
        # Guarded by `_admission`: the gate, and what callers' threads change.
        self._admission = threading.Condition()
        self._closed: EngineError | None = EngineDraining("the engine has not been started")
        self._owned = False  # the engine's thread is there and takes messages
        self._submitted = self._refused = self._in_flight = 0
        self._arrivals: list[Request] = []
        self._hungry = True  # lanes are free, so the engine's thread is to be woken for a single image
        # Owned by the engine's thread.
        self._core = Core(budget, scheduler, class_names, exits, observer)
        self._n_delivered = 0  # of those that the core has ended
        self._n_running = 0  # batches with the lanes
        self._messages: deque[Batch | Abandon | Call | Wake | Stop] = deque()  # taken from the inbox

    # --- any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Warm up every stage, then take requests. Takes about a second; call it once.

        Raises:
            RunnerError: a stage cannot run.
        """
        scheduler = self._core.scheduler
        self.stage_seconds = [dict(seconds) for seconds in self._runner.warm_up()]
        fits = [fit_stage_time(seconds) for seconds in self.stage_seconds]
        scheduler.ripe = tuple(ripe_rows(fixed_s, per_row_s, scheduler.max_rows) for fixed_s, per_row_s in fits)
        self._lanes.start()
        with self._admission:
            self._closed, self._owned = None, True
            self._thread.start()

    @property
    def n_lanes(self) -> int:
        return self._runner.n_lanes

    @property
    def max_rows(self) -> int:
        """The largest batch."""
        return self._core.scheduler.max_rows

    @property
    def is_alive(self) -> bool:
        """True from `start` until the engine has stopped or broken down."""
        return self._owned

    def submit(self, image: NDArray[np.uint8], options: Options | None = None) -> "Future[Answer]":
        """Classify one image; cancelling the future abandons it.

        Args:
            image: uint8 [H, W, 3] of the network's size; it must not be changed until the answer is there.
            options: see `Options`.

        Returns:
            a future of the answer, or of an EngineError where it failed.

        Raises:
            ValueError: the image is not what the network takes.
            EngineOverloaded: too many images are in flight.
            EngineDraining: the engine is not taking any.
            EngineError: it has broken down.
        """
        future: Future[Answer] = Future()
        request = self.submit_to(_resolve, future, image, options)
        future.add_done_callback(lambda done: self.abandon(request) if done.cancelled() else None)
        return future

    def submit_to(self, sink: Sink, token: Any, image: NDArray[np.uint8], options: Options | None = None) -> Request:
        """Classify one image and have (token, outcome) delivered to `sink`, with the others that its batch has ended.

        For an event loop, which is so woken once a batch, not once an image. Raises as `submit` does. The request
        returned is for `abandon` alone.
        """
        request = Request(token, sink, options or Options(), self._runner.first_state(image))
        with self._admission:
            self._submitted += 1
            if self._closed is not None or self._in_flight >= self.max_in_flight_rows:
                self._refused += 1
                raise self._closed or EngineOverloaded(self._in_flight)
            self._in_flight += 1
            self._arrivals.append(request)
            if self._hungry or not request.options.is_plain:  # its deadline may be near
                self._hungry = False
                self._inbox.put(Wake())
        return request

    def abandon(self, request: Request) -> None:
        """Give a request up: it runs no further stage, and nothing is delivered unless that has happened already."""
        self._inbox.put(Abandon(request))

    def ask(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function on the engine's thread, between batches. Waiting for it on that thread would take for ever."""
        call = Call(function)
        with self._admission:
            if self._owned:
                self._inbox.put(call)
                return call.future
        call.run()  # not started yet, or ended: nobody else owns what it reads
        return call.future

    def set_budget(self, budget_mflops: float) -> BudgetState:
        """Set the average mflops per image for images admitted from now on; returns the new state.

        Raises:
            ValueError: the budget is out of the network's reach; the message gives its range.
        """
        budget = self._core.budget

        def change() -> BudgetState:
            budget.set(budget_mflops)
            return budget.state()

        return self.ask(change).result()

    def budget_state(self) -> BudgetState:
        """What the budget is, what it does and what was spent: exact, taken between batches (well under 1 ms)."""
        return self.ask(self._core.budget.state).result()

    def stats(self) -> EngineStats:
        """Counts: exact, taken between batches (well under 1 ms)."""
        return self.ask(self._stats).result()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, answer those accepted, and stop. What is not answered in time fails.

        May be called again, and from any thread but the engine's own.

        Returns:
            True if every accepted request got its outcome in time.
        """
        with self._admission:
            self._closed = self._closed or EngineDraining("the engine is stopping and takes no new requests")
            in_time = self._admission.wait_for(lambda: self._in_flight == 0, timeout_s)
        self._inbox.put(Stop())
        if self._thread.is_alive():
            self._thread.join()
        self._lanes.stop(timeout_s=1.0)
        return in_time

    # --- the engine's thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        ending = EngineError("the engine stopped before this image was answered")
        try:
            while self._take_messages():
                self._dispatch()
                self._deliver()
        except Exception as error:
            logger.exception("the engine broke down")
            ending = EngineError(f"the engine broke down ({type(error).__name__}: {error}): restart the server")
        self._wind_up(ending)

    def _take_messages(self) -> bool:
        """Wait for a message, then take all there are, and all images before them; False once told to stop.

        While all lanes are busy, arrivals do not wake the engine: it could do nothing for them, and a wake-up for each
        image costs as much as all that the engine does for it. The next batch that has run brings it here.
        """
        with self._admission:
            lanes_are_free = self._n_running < self._max_running
            self._hungry = lanes_are_free and not self._arrivals
        if self._hungry or not lanes_are_free:
            self._wait()
        self._messages += [self._inbox.get() for _ in range(self._inbox.qsize())]
        self._take_arrivals()
        goes_on = True
        while self._messages:
            message = self._messages.popleft()
            if isinstance(message, Batch):
                self._n_running -= 1
                self._core.finish(message, self.clock())
            elif isinstance(message, Abandon):
                self._core.abandon(message.request)
            elif isinstance(message, Call):
                message.run()
            elif isinstance(message, Stop):
                goes_on = False
        if self._core.deadlines.next_s < inf:
            self._core.expire(self.clock())
        return goes_on

    def _wait(self) -> None:
        """Wait for a message, or for the next deadline."""
        due_s = self._core.deadlines.next_s
        if due_s == inf:
            self._messages.append(self._inbox.get())
            return
        with suppress(Empty):
            self._messages.append(self._inbox.get(timeout=max(0.0, due_s - self.clock())))

    def _take_arrivals(self) -> None:
        with self._admission:
            arrivals, self._arrivals = self._arrivals, []
        if arrivals:
            self._core.admit(arrivals, self.clock())

    def _dispatch(self) -> None:
        while self._n_running < self._max_running:
            batch = self._core.next_batch(self.clock())
            if batch is None:
                return
            self._n_running += 1
            self._lanes.put(batch)

    def _deliver(self) -> None:
        n_new = self._core.n_ended - self._n_delivered
        if not n_new and not self._core.outbox:
            return
        self._n_delivered += n_new
        for sink, outcomes in self._core.outbox.items():
            try:
                sink(outcomes)
            except Exception:  # a client's trouble is not the engine's
                logger.exception("%d outcomes could not be delivered", len(outcomes))
        self._core.outbox.clear()
        if not n_new:  # steps alone
            return
        with self._admission:
            self._in_flight -= n_new
            self._admission.notify_all()

    def _wind_up(self, error: EngineError) -> None:
        """Whatever happened, nobody is left waiting: end every request, then hand over what the thread owned."""
        with self._admission:
            self._closed = self._closed or error
            self._owned = False
        # Nothing comes from here on but abandonments and batches, which end below all the same.
        self._take_arrivals()
        self._messages += [self._inbox.get() for _ in range(self._inbox.qsize())]
        for message in self._messages:
            if isinstance(message, Call):
                message.run()
        self._core.fail_all(error)
        self._deliver()

    def _stats(self) -> EngineStats:
        core = self._core
        with self._admission:
            submitted, refused, in_flight = self._submitted, self._refused, self._in_flight
        return EngineStats(
            submitted=submitted,
            answered=core.n_answered,
            refused=refused + core.n_late,
            abandoned=core.n_abandoned,
            failed=core.n_failed,
            in_flight_rows=in_flight - (core.n_ended - self._n_delivered),
            queued_rows=tuple(core.scheduler.queued_rows(stage) for stage in range(self._runner.n_stages)),
            running_batches=self._n_running,
            exits=dict(core.exits),
        )


def _resolve(outcomes: list[tuple[Any, Told]]) -> None:
    """The sink behind `submit`: tokens are futures, which have no use for steps."""
    for future, outcome in outcomes:
        if isinstance(outcome, Step) or not future.set_running_or_notify_cancel():
            continue
        if isinstance(outcome, Answer):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
