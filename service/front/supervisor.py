"""Starts the workers, replaces those that die, and stops them all without losing a request."""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from queue import SimpleQueue
from time import monotonic
from types import FrameType

from models.bundle import Bundle
from service.budget.target import Keeper, Targets
from service.engine.engine import Engine
from service.engine.inbox import next_message
from service.front.hub import Hub
from service.front.memory import Layout, SharedMemory
from service.front.setup import Setup
from service.front.wire import Kind
from service.metrics import Metrics
from service.server import FAILED_S, STOPS, ServerFailed
from service.settings import Settings
from service.settled_memory import settle_memory
from service.tally import Tally

logger = logging.getLogger(__name__)

BEGIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
SOUND_S = 10.0  # the backoff of a worker that has run this long is reset
LOOK_S = 1.0  # poll interval: a signal delivered to another thread does not interrupt the main thread's wait
# A worker whose event loop has not turned for this many looks is killed, and replaced like any that dies. Looks rather
# than seconds: when all processes have been suspended together, no worker is stuck.
STUCK_LOOKS = 30
END_S = 5.0  # for workers to exit after --drain-s, or after closing their channel


@dataclass(frozen=True, slots=True)
class Serving:
    worker: int


@dataclass(frozen=True, slots=True)
class Gone:
    worker: int
    n_lost: int  # requests that it had in flight


class Signal:
    """A signal to stop has arrived."""


@dataclass(frozen=True, slots=True)
class Broken:
    error: Exception


Event = Serving | Gone | Signal | Broken


class Front:
    """The workers in front of an engine.

    Args:
        bundle, targets, settings, admin_token: passed on to the workers.
        listener: the listening socket, from which every worker accepts.
    """

    def __init__(
        self,
        bundle: Bundle,
        targets: Targets,
        settings: Settings,
        admin_token: str | None,
        listener: socket.socket,
    ) -> None:
        manifest, self._n_workers = bundle.manifest, settings.http_workers
        layout = Layout(
            n_workers=self._n_workers,
            n_slots=settings.max_in_flight,  # one worker may have all images in flight
            height_px=manifest.input.height_px,
            width_px=manifest.input.width_px,
            n_exits=len(manifest.exits),
        )
        self._listener = listener
        self._drain_s, self._max_in_flight = settings.drain_s, settings.max_in_flight
        self._memory = SharedMemory.create(layout)
        self._setup = os.memfd_create("exitserve-setup", os.MFD_CLOEXEC)
        self._configuration = bundle, targets, settings, admin_token
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._began_s = [0.0] * self._n_workers
        self._backoff_s = [BEGIN_BACKOFF_S] * self._n_workers
        self._restarts: dict[int, float] = {}  # due time by worker (monotonic)
        self._serving: set[int] = set()
        self._last_look_s = 0.0  # monotonic
        self._beats = [0] * self._n_workers  # seen at the last look
        self._n_still = [0] * self._n_workers  # looks since they rose
        self._is_ending = self._is_signalled = False
        self._n_failed = 0  # workers that ended with an error, or not in time, during shutdown

    @property
    def tallies(self) -> list[Tally]:
        """Counts of request outcomes, one tally per worker; for `Metrics`."""
        return [self._memory.tally(worker) for worker in range(self._n_workers)]

    def serve(self, engine: Engine, metrics: Metrics, keeper: Keeper, say_ready: Callable[[], object]) -> int:
        """Start the engine and the workers, serve until a stop signal, and return the exit code.

        Raises:
            ServerFailed: the engine did not start or broke down, or a worker ended before it had served.
        """
        self._memory = self._memory.with_canvas(engine.canvas_px)
        Setup(*self._configuration, self._memory.layout).write(self._setup)
        hub = Hub(
            engine,
            metrics,
            keeper,
            self._memory,
            on_serving=lambda worker: self._events.put(Serving(worker)),
            on_gone=lambda worker, n_lost: self._events.put(Gone(worker, n_lost)),
            on_broken=lambda error: self._events.put(Broken(error)),
        )
        for number in STOPS:
            signal.signal(number, self._on_signal)
        hub.start()
        try:
            for worker in range(self._n_workers):
                try:
                    self._start(worker, hub)
                except OSError as error:
                    raise ServerFailed(f"the HTTP workers cannot be started ({error})") from error
            self._start_engine(engine, hub)
            self._supervise(hub, say_ready)
        finally:
            for process in self._processes.values():
                process.kill()
                process.wait()
            engine.drain(1.0)
            hub.stop()
        return 1 if self._n_failed else 0

    def _start_engine(self, engine: Engine, hub: Hub) -> None:
        try:
            engine.start()
        except Exception as error:
            logger.exception("the engine cannot start")
            raise ServerFailed(str(error)) from error
        engine.broken.add_done_callback(lambda broken: self._events.put(Broken(broken.result())))
        hub.publish()
        settle_memory(self._max_in_flight)
        for worker in range(self._n_workers):
            hub.tell(worker, Kind.STARTED)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_signalled and number == signal.SIGHUP:  # see `service.server`
            return
        if self._is_signalled:
            logger.warning("second signal: stopping at once, %d unanswered", self._memory.in_flight_rows)
            for process in self._processes.values():
                process.kill()
            logging.shutdown()
            os._exit(128 + number)
        self._is_signalled = True
        if not self._is_ending:  # else the engine has broken down, whose shutdown has a shorter time limit
            self._is_ending = True
            self._events.put(Signal())

    def _start(self, worker: int, hub: Hub) -> None:
        self._memory.set_beats(worker, 0)
        ours, theirs = socket.socketpair()
        descriptors = (self._listener.fileno(), theirs.fileno(), self._memory.descriptor, self._setup)
        with theirs:
            # Blocked until the worker has its handlers: a signal while it imports would end it with a stack trace.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            try:
                self._processes[worker] = subprocess.Popen(
                    [sys.executable, "-m", "service.front.worker", str(worker), *map(str, descriptors)],
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                )
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._began_s[worker] = monotonic()
        hub.attach(worker, ours)

    def _supervise(self, hub: Hub, say_ready: Callable[[], object]) -> None:
        is_ready = False
        ends_s = 0.0  # deadline for the workers to exit; 0 until shutdown begins
        while self._processes or self._restarts:
            event = self._next_event(ends_s)
            if isinstance(event, Signal):
                logger.info("stopping: every HTTP worker first answers what it has accepted")
                ends_s = self._end(hub, self._drain_s, Kind.DRAIN)
            elif isinstance(event, Broken):
                ends_s = self._end(hub, FAILED_S, Kind.BROKEN, str(event.error))
            elif isinstance(event, Serving):
                self._serving.add(event.worker)
                if not is_ready and len(self._serving) == self._n_workers:
                    is_ready = True
                    say_ready()
            elif isinstance(event, Gone):
                if not is_ready and not self._is_ending:
                    raise ServerFailed("an HTTP worker exited before it had served: see its messages above")
                self._bury(event)
            elif ends_s:
                logger.error("%d workers did not exit in time", len(self._processes))
                self._n_failed += len(self._processes)
                return
            self._restart_due(hub)

    def _restart_due(self, hub: Hub) -> None:
        for worker in [worker for worker, due_s in self._restarts.items() if due_s <= monotonic()]:
            del self._restarts[worker]
            try:
                self._start(worker, hub)
            except OSError as error:  # out of memory or processes: the other workers go on
                backoff_s = self._back_off(worker)
                logger.error("HTTP worker %d cannot be started (%s): retrying in %g s", worker + 1, error, backoff_s)
                continue
            hub.tell(worker, Kind.STARTED)

    def _back_off(self, worker: int) -> float:
        """Schedule a worker's restart; returns the delay in seconds, which doubles each time."""
        backoff_s = self._backoff_s[worker]
        self._backoff_s[worker] = min(MAX_BACKOFF_S, 2 * backoff_s)
        self._restarts[worker] = monotonic() + backoff_s
        return backoff_s

    def _end(self, hub: Hub, within_s: float, kind: Kind, text: str = "") -> float:
        """Tell the workers to exit; returns their deadline (monotonic)."""
        self._is_ending = True
        self._restarts.clear()
        self._listener.close()  # the workers hold it too, and refuse new requests until they exit
        for worker in self._processes:
            hub.tell(worker, kind, text)
        return monotonic() + within_s + END_S

    def _next_event(self, ends_s: float) -> Event | None:
        """Wait for the next event; None when a restart or the exit deadline is due."""
        due_s = ends_s or min(self._restarts.values(), default=inf)
        while True:
            event = next_message(self._events, min(due_s - monotonic(), LOOK_S))
            self._kill_stuck()
            if event is not None or monotonic() >= due_s:
                return event

    def _kill_stuck(self) -> None:
        """Kill workers that have stopped for good: they hold connections, and requests that count as in flight."""
        if monotonic() < self._last_look_s + LOOK_S:
            return
        self._last_look_s = monotonic()
        for worker, process in self._processes.items():
            beats = self._memory.beats_of(worker)
            is_still = beats == self._beats[worker] and beats > 0  # 0: it is still loading, which may take long
            self._beats[worker] = beats
            self._n_still[worker] = self._n_still[worker] + 1 if is_still else 0
            if self._n_still[worker] == STUCK_LOOKS:
                logger.error(
                    "HTTP worker %d (process %d) has not responded for %g s: killing it",
                    worker + 1,
                    process.pid,
                    STUCK_LOOKS * LOOK_S,
                )
                process.kill()

    def _bury(self, gone: Gone) -> None:
        worker = gone.worker
        process = self._processes.pop(worker)
        self._serving.discard(worker)
        try:
            code = process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if self._is_ending:
            self._n_failed += code != 0
            return
        tally = self._memory.tally(worker)
        for _ in range(gone.n_lost):
            tally.count("failed")  # the dead worker cannot count them, and an alert depends on this count
        if monotonic() - self._began_s[worker] > SOUND_S:
            self._backoff_s[worker] = BEGIN_BACKOFF_S
        level = logging.ERROR if code else logging.WARNING
        logger.log(
            level,
            "HTTP worker %d (process %d) exited with code %d and %d requests in flight: restarting in %g s",
            worker + 1,
            process.pid,
            code,
            gone.n_lost,
            self._back_off(worker),
        )
