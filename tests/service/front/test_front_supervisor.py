"""The supervisor of HTTP workers when a worker cannot be started, or a signal comes at a bad time."""

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.bundle import load_bundle
from service.budget.target import Targets
from service.front.hub import Hub
from service.front.supervisor import BEGIN_BACKOFF_S, MAX_BACKOFF_S, STUCK_LOOKS, Front, Gone
from service.front.wire import Kind
from service.settings import Settings
from service.tally import OUTCOME_AT


class NoHub(Hub):
    """A hub without workers."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Kind]] = []

    def tell(self, worker: int, kind: Kind, text: str = "") -> None:
        self.told.append((worker, kind))


@pytest.fixture
def supervisor(bundle_path: Path) -> Iterator[Front]:
    bundle = load_bundle(bundle_path)
    settings = Settings(bundle=bundle_path, http_workers=2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Front(bundle, Targets(bundle.frontier(), bundle.costs_mflops), settings, None, listener)


def test_a_worker_that_cannot_be_restarted_is_retried_later(
    supervisor: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(subprocess, "Popen", no_memory)
    hub = NoHub()
    for times in (1, 2):
        supervisor._restarts = {1: 0.0}
        supervisor._restart_due(hub)
        assert list(supervisor._restarts) == [1]
        why = "worker 2 cannot be started ([Errno 12] Cannot allocate memory)"
        assert f"{why}: retrying in {times * BEGIN_BACKOFF_S:g} s" in caplog.text
    assert hub.told == []
    assert max(supervisor._back_off(1) for _ in range(20)) == MAX_BACKOFF_S


def test_requests_lost_with_a_worker_are_counted(supervisor: Front) -> None:
    for process in (subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])):
        supervisor._processes[1] = process
        process.kill()
        supervisor._bury(Gone(1, 3))
        supervisor._is_ending = True  # the second was told to end: it has told its requests, too
    failed = [tally.read()[OUTCOME_AT["failed"]] for tally in supervisor.tallies]
    assert failed == [0, 3]


def test_the_first_signal_after_a_breakdown_does_not_count_as_the_second(
    supervisor: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    supervisor._end(NoHub(), 1.0, Kind.BROKEN, "the engine broke down")
    supervisor._on_signal(signal.SIGTERM, None)
    assert ends == []
    supervisor._on_signal(signal.SIGTERM, None)
    assert ends == [128 + signal.SIGTERM]


def test_a_worker_whose_event_loop_stands_still_is_killed(supervisor: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.front.supervisor.LOOK_S", 0.0)
    memory = supervisor._memory
    with subprocess.Popen(["sleep", "60"]) as turns, subprocess.Popen(["sleep", "60"]) as stands:
        supervisor._processes = {0: turns, 1: stands}
        for _ in range(2 * STUCK_LOOKS):  # the second is still loading
            memory.set_beats(0, memory.beats_of(0) + 1)
            supervisor._kill_stuck()
        for beats in (1, 2):
            memory.set_beats(1, beats)
            for _ in range(STUCK_LOOKS):  # the first of them sees it turn
                memory.set_beats(0, memory.beats_of(0) + 1)
                supervisor._kill_stuck()
            assert stands.poll() is None
        supervisor._kill_stuck()
        assert stands.wait() == -signal.SIGKILL
        assert turns.poll() is None
        turns.kill()
