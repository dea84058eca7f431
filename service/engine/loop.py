"""The engine's thread, which owns the scheduler, the budget and every row. See `service.engine.engine`.

take arrivals and finished batches -> decide who leaves and who goes on -> dispatch to free lanes -> deliver the answers
"""

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from math import inf
from queue import SimpleQueue
from typing import Final, TypeVar

from models.scores import Score
from service.budget.degrade import Degrade
from service.engine.admission import Admission
from service.engine.core import Core
from service.engine.guard import Guard
from service.engine.inbox import Abandon, Call, Message, Stop, Wake, next_message
from service.engine.lanes import Batch, Lanes, ThreadLanes
from service.engine.launching import AT_ONCE, LaunchingLanes
from service.engine.outbox import deliver, turn_away
from service.engine.pace import Pace
from service.engine.rows import Request
from service.errors import EngineError, EngineLost, EngineUnsound
from service.runners.base import FatalRunnerError, LaunchingRunner, Runner

logger = logging.getLogger(__name__)
T = TypeVar("T")
NAP_S: Final = 50e-6  # between two polls of a device, at least: an operating system may make 200 us of it
LOST_NAP_S: Final = 0.01  # the same when every batch on the device has been given up
MANY_ROWS: Final = 128  # in running batches
SPIN_S: Final = 0.5e-3  # how long to poll without sleep when only one batch is in flight, which takes less


def lanes_for(runner: Runner, score: Score, post: Callable[[Batch], None]) -> Lanes:
    """The lanes for a runner: driven by the engine's thread if it launches ahead, else threads."""
    if isinstance(runner, LaunchingRunner) and runner.runs_ahead:
        return LaunchingLanes(runner, score, post)
    return ThreadLanes(runner, score, post)


class Loop:
    """Feeds the core with messages and finished batches, and the lanes with its batches.

    Any thread may put messages into `inbox`.

    Args:
        core: owned by the thread from `start` until it ends.
        runner, score: for the lanes.
        max_queue_s, hang_s: see `Engine`.
        clock: seconds.
    """

    def __init__(
        self,
        core: Core,
        runner: Runner,
        score: Score,
        admission: Admission,
        degrade: Degrade,
        max_queue_s: float,
        hang_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.core = core
        self.admission = admission
        self.degrade = degrade
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.guard = Guard(runner.n_lanes, hang_s)
        self.pace = Pace(runner.n_lanes, 0.0)
        self.owns = False  # the thread is running and takes messages
        self.n_delivered = 0  # requests that the core has ended and admission has released
        self._lanes = lanes_for(runner, score, self._post)
        self._max_queue_s = max_queue_s
        self._max_rows = admission.room_rows
        self._clock = clock
        self.trouble: str | None = None  # `Guard.unsound`, once admission has been closed or reopened; for any thread
        self.broken: Future[EngineError] = Future()
        self._arrivals: list[Request] = []  # taken from admission, not yet admitted to the core
        self._messages: deque[Message] = deque()  # taken from the inbox
        self._ran: deque[Batch] = deque()  # posted by lanes
        self._n_paced = 0  # ended requests reported to the pace
        self._n_out = 0  # batches dispatched and not returned, including those given up
        self._is_behind = False  # `Core.is_behind` at the last dispatch; read by lanes
        self._handing_over = threading.Lock()  # held while ownership passes to the thread and back
        self._owner = threading.Thread(target=self._work, name="exitserve-engine", daemon=True)

    # --- any thread ---------------------------------------------------------------------------------------------

    def start(self, stage_seconds: Sequence[Mapping[int, float]], max_rows: int) -> None:
        """Take requests from now on. `stage_seconds`: by batch rows, per stage; `max_rows`: of the largest batch."""
        self.guard.expect(stage_seconds, max_rows)
        image_s = sum(seconds[max(seconds)] / max(seconds) for seconds in stage_seconds)
        self.pace = Pace(self.guard.n_lanes, image_s)
        self._lanes.start()
        with self._handing_over:
            self.admission.open()
            self.owns = True
            self._owner.start()

    def ask(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function between batches. Waiting for it on the engine's thread would deadlock."""
        call = Call(function)
        with self._handing_over:
            if self.owns:
                self.inbox.put(call)
                return call.future
        call.run()  # not started, ended or winding up: on the caller's thread, perhaps concurrently with other callers
        return call.future

    def stop(self) -> None:
        """Stop after the messages received so far, and wait for the threads to end."""
        self.inbox.put(Stop())
        if self._owner.is_alive():
            self._owner.join()
        self._lanes.stop(timeout_s=1.0)

    # --- lanes --------------------------------------------------------------------------------------------------

    def _post(self, batch: Batch) -> None:
        """Hand a batch back. With `_is_behind`, wake the engine's thread only when no batch is left for a lane to take:
        each time it wakes, its code has left the CPU cache, which costs more than processing a batch does."""
        self._ran.append(batch)
        if not (self._is_behind and self._lanes.n_waiting):
            self.inbox.put(Wake())

    # --- the engine's thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        broken: EngineError | None = None
        try:
            while self._take_messages():
                self._dispatch()
                self._deliver()
        except FatalRunnerError as error:
            logger.critical("the device is lost: %s", error)
            broken = EngineLost(f"the device is lost ({error})")
        except Exception as error:
            logger.exception("the engine broke down")
            broken = EngineError(f"the engine broke down ({type(error).__name__}: {error}): restart the server")
        try:
            self._wind_up(broken or EngineError("the engine stopped before this image was answered"))
        except Exception:
            logger.exception("some requests in flight could not be ended")
        if broken is not None:
            self.broken.set_result(broken)

    def _take_messages(self) -> bool:
        """Wait for a message, then process all there are, after arrivals and finished batches; False to stop.

        While all lanes are busy, arrivals do not wake the engine: it could do nothing for them, and a wake-up per image
        costs as much as the engine's work for it. The next finished batch wakes it.
        """
        lanes_are_free = len(self.guard.running) < self._max_running
        if self.admission.wait_for_one(lanes_are_free) or not lanes_are_free:
            self._wait()
        self._messages += [self.inbox.get() for _ in range(self.inbox.qsize())]
        self._take_arrivals()
        self._ran.extend(self._lanes.poll())
        while self._ran:
            self._take_back(self._ran.popleft())
        goes_on = True
        while self._messages:
            message = self._messages.popleft()
            if isinstance(message, Abandon):
                self.core.abandon(message.request)
            elif isinstance(message, Call):
                message.run()
            elif isinstance(message, Stop):
                goes_on = False
        due_s = self._due_s
        if due_s < inf and (now_s := self._clock()) >= due_s:
            self.core.expire(now_s)
            for batch in self.guard.look(now_s):
                self.core.fail(batch, "did not return in time", now_s)
        if self.guard.unsound is not self.trouble:
            self._follow_soundness()
        return goes_on

    @property
    def _due_s(self) -> float:
        return min(self.core.deadlines.next_s, self.guard.next_s)

    def _wait(self) -> None:
        """Wait for a message, the next deadline, or the guard's next check."""
        due_s = self._due_s
        if self._lanes.is_driven and self._n_out:
            return self._drive(due_s)
        message = next_message(self.inbox, due_s - self._clock())
        if message is not None:
            self._messages.append(message)

    def _drive(self, due_s: float) -> None:
        """Wait likewise, for lanes that this thread must poll; also returns when a batch has run."""
        running = len(self.guard.running)
        is_alone = running == 1 and self._n_out == 1 and not len(self.core.scheduler)
        now_s = self._clock()
        spin_s = now_s + SPIN_S if is_alone else 0.0
        if sum([len(batch.rows) for batch in self.guard.running]) >= MANY_ROWS:
            time.sleep(0)  # yield the interpreter to threads that submit images, so that batches stay large
        while self.inbox.empty() and now_s < due_s:
            if ran := self._lanes.poll():
                self._ran.extend(ran)
                return
            if now_s < spin_s:
                select.select((), (), (), 0)  # releases the interpreter lock without sleeping
            else:
                time.sleep(NAP_S if running else LOST_NAP_S)
            now_s = self._clock()

    def _take_back(self, batch: Batch) -> None:
        self._n_out -= 1
        if isinstance(batch.error, FatalRunnerError):
            raise batch.error  # no running or waiting batch can complete any more
        core, now_s = self.core, self._clock()
        if not self.guard.ended(batch, now_s):
            return
        core.finish(batch, now_s)
        # Includes rows abandoned between batches, if they had run: their time is part of the batch seconds.
        n_ended = core.n_ended - core.budget.ledger.abandoned_unspent
        self.pace.ran(batch.ended_s - batch.started_s, n_ended - self._n_paced)
        self._n_paced = n_ended

    def _follow_soundness(self) -> None:
        """Fail everything in flight and close admission while no stage can be run; reopen it when they can again."""
        why = self.guard.unsound
        if why is None:
            logger.warning("the stages can be run again")
            self.admission.reopen()
            self.trouble = None
            return
        logger.critical("no stage can be run: %s", why)
        error = EngineUnsound(f"no stage can be run: {why}")
        self.admission.close(error)
        self.trouble = why
        self._take_arrivals()
        self.core.fail_all(error)
        self.guard.give_up_all()

    def _take_arrivals(self) -> None:
        self._arrivals += self.admission.take()
        now_s = self._clock()
        self.degrade.follow(now_s, self.admission.in_flight, self.pace.row_s)
        if self._arrivals:
            self.core.admit(self._arrivals, now_s)
            self._arrivals = []

    def _dispatch(self) -> None:
        while len(self.guard.running) < self._max_running:
            now_s = self._clock()
            batch = self.guard.trial(now_s) or self.core.next_batch(now_s)
            if batch is None:
                break
            self.guard.began(batch, now_s)
            self._n_out += 1
            self._lanes.put(batch)
        self._is_behind = self.core.is_behind(self.guard.n_lanes)

    @property
    def _max_running(self) -> int:
        lanes = self.guard.lanes_left
        return AT_ONCE * lanes if self._lanes.is_driven else self.core.batches_out(lanes)

    def _deliver(self) -> None:
        n_new = self.core.n_ended - self.n_delivered
        if not n_new and not self.core.outbox:
            return
        self.n_delivered += n_new
        if n_new:  # before delivery: a client with an answer may send its next image at once
            room_rows = self.pace.room_rows(self.degrade.bearable_wait_s(self._max_queue_s), self._max_rows)
            self.admission.leave(n_new, room_rows, self.pace.row_s)
        deliver(self.core.outbox)

    def _wind_up(self, error: EngineError) -> None:
        """Hand over what the thread owned and end every request, even after a failure of the core or the budget."""
        with self._handing_over:
            self.admission.close(error)
            self.owns = False
        # From here on, only abandonments and batches can arrive; their requests end below in any case.
        self._arrivals += self.admission.take()
        self._messages += [self.inbox.get() for _ in range(self.inbox.qsize())]
        for message in self._messages:
            if isinstance(message, Call):
                message.run()
        try:
            self.core.fail_all(error)
        finally:  # without the accounts or the pace, whose code may be what failed
            self.core.n_failed += turn_away(self.core.outbox, self._arrivals, error)
            self.admission.leave(self.core.n_ended - self.n_delivered, self.admission.room_rows, self.admission.row_s)
            self.n_delivered = self.core.n_ended
            deliver(self.core.outbox)
