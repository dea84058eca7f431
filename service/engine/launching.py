"""Lanes for a device with asynchronous launches: the engine's thread launches batches and collects their results.

Launching a batch and polling for its completion each take microseconds. A thread per lane would have to be woken, and
acquire the interpreter, for each of them, which takes longer than either.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from models.scores import Score
from service.engine.lanes import TRIAL, Batch, Lanes, result_of
from service.runners.base import LaunchingRunner, Pending

AT_ONCE: Final = 2  # batches per lane: one runs and one waits behind it, so that the lane never waits for a decision


class LaunchingLanes(Lanes):
    """See the module. All methods are for the engine's thread.

    Args:
        runner: launches the batches.
        post: called on another thread with trials that have run.
    """

    is_driven = True

    def __init__(self, runner: LaunchingRunner, score: Score, post: Callable[[Batch], None]) -> None:
        self._runner, self._score, self._post = runner, score, post
        self._launched: list[deque[tuple[Batch, Pending | None]]] = [deque() for _ in range(runner.n_lanes)]
        self._waiting: deque[Batch] = deque()
        self._failed: list[Batch] = []  # failed at launch, or given up before it

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        pass

    def put(self, batch: Batch) -> None:
        self._waiting.append(batch)
        self._launch_waiting()

    def poll(self) -> list[Batch]:
        """Return the batches that have run or failed since the last call, and launch waiting ones in their place."""
        ran, self._failed = self._failed, []
        for lane in self._launched:
            while lane:
                batch, pending = lane[0]
                if pending is None:  # a trial
                    if batch.ended_s:
                        lane.popleft()
                    break
                if not _has_run(pending):
                    break
                lane.popleft()
                self._take_back(batch, pending)
                ran.append(batch)
                if lane:
                    lane[0][0].started_s, lane[0][0].behind = batch.ended_s, None
        if self._waiting:
            self._launch_waiting()
        return ran

    def stop(self, timeout_s: float) -> None:
        """Wait for launched batches, so that the device does not write to memory that is freed afterwards."""
        until_s = time.perf_counter() + timeout_s
        while any(self._launched) and time.perf_counter() < until_s:
            self.poll()
            time.sleep(0.001)

    def _launch_waiting(self) -> None:
        while self._waiting:
            batch = self._waiting[0]
            lane = self._lane_for(batch)
            if lane is None:
                return
            self._waiting.popleft()
            if batch.given_up:
                batch.ended_s = time.perf_counter()
                self._failed.append(batch)
            elif batch.stage == TRIAL:
                batch.started_s = time.perf_counter()
                lane.append((batch, None))
                threading.Thread(target=self._try_all, args=(batch,), name="exitserve-trial", daemon=True).start()
            else:
                self._launch(batch, lane)

    def _lane_for(self, batch: Batch) -> deque[tuple[Batch, Pending | None]] | None:
        """The least loaded lane with room; None if every lane is full, hangs, or runs a trial.

        A trial needs an idle lane of the runner, so it has a lane to itself.
        """
        room = 1 if batch.stage == TRIAL else AT_ONCE
        best: deque[tuple[Batch, Pending | None]] | None = None
        for lane in self._launched:
            if len(lane) < room and (best is None or len(lane) < len(best)):
                if lane and (lane[0][1] is None or lane[0][0].given_up):
                    continue
                best = lane
        return best

    def _launch(self, batch: Batch, lane: deque[tuple[Batch, Pending | None]]) -> None:
        """Launch a batch. Behind another one, it counts as started once that has returned."""
        ahead: Pending | None = None
        if lane:
            batch.behind, ahead = lane[-1]
        else:
            batch.started_s = time.perf_counter()
        try:
            pending = self._runner.launch(batch.stage, batch.states, ahead, batch.wants_logits)
        except Exception as error:  # affects the images of this batch only; the lane goes on
            batch.error, batch.ended_s = error, time.perf_counter()
            batch.started_s, batch.behind = batch.started_s or batch.ended_s, None
            batch.states = ()
            self._failed.append(batch)
        else:
            lane.append((batch, pending))

    def _take_back(self, batch: Batch, pending: Pending) -> None:
        try:
            batch.result = result_of(self._score, batch, pending.collect())
        except Exception as error:  # as at the launch
            batch.error = error
        batch.ended_s = time.perf_counter()
        batch.states = ()

    def _try_all(self, batch: Batch) -> None:
        """Run a trial. It takes long, hence on its own thread."""
        try:
            self._runner.warm_up(0.0)
        except Exception as error:  # of any kind: the guard takes the runner to be unsound
            batch.error = error
        batch.ended_s = time.perf_counter()
        self._post(batch)


def _has_run(pending: Pending) -> bool:
    try:
        return pending.has_run()
    except Exception:
        return True  # it has failed; `collect` raises the error
