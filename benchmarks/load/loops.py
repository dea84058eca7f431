"""Sends requests at times fixed beforehand (open loop), or each as soon as another is answered (closed loop).

No coordinated omission: in an open loop latency counts from when a request was *due* to be sent, so a server that
stalls is charged for all requests due meanwhile.
"""

import asyncio
import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import numpy as np

from benchmarks.load.arrivals import Times
from benchmarks.load.connection import CLOSED, Pool
from benchmarks.load.result import Result

RETRY_S = 0.02
UNANSWERED = -1  # in place of a status: no answer before the run ended


class _Record:
    """Times, statuses and bodies of all requests so far, indexed by request."""

    def __init__(self) -> None:
        self.intended_s: list[float] = []
        self.sent_s: list[float] = []
        self.done_s: list[float] = []
        self.statuses: list[int] = []
        self.bodies: list[bytes] = []
        self.n_done = 0

    def add(self, intended_s: float, sent_s: float) -> int:
        self.intended_s.append(intended_s)
        self.sent_s.append(sent_s)
        self.done_s.append(math.nan)
        self.statuses.append(UNANSWERED)
        self.bodies.append(b"")
        return len(self.statuses) - 1

    def done(self, index: int, at_s: float, status: int, body: bytes) -> None:
        self.done_s[index], self.statuses[index], self.bodies[index] = at_s, status, body
        self.n_done += 1

    def result(self, n_images: int, seconds: float, client_cpu_s: float, stopped_early: bool) -> Result:
        return Result(
            intended_s=np.array(self.intended_s),
            sent_s=np.array(self.sent_s),
            done_s=np.array(self.done_s),
            statuses=np.array(self.statuses, np.int16),
            image_index=np.arange(len(self.statuses)) % n_images,
            bodies=self.bodies,
            seconds=seconds,
            client_cpu_s=client_cpu_s,
            stopped_early=stopped_early,
        )


@contextmanager
def _no_collector() -> Iterator[None]:
    """Prevent stalls of the client by garbage collection."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def open_loop(
    url: str,
    requests: Sequence[bytes],
    arrivals: Times,
    *,
    max_connections: int = 1024,
    drain_s: float = 10.0,
    limit_s: float = math.inf,
    allowed_late: float = 1.0,
) -> Result:
    """Send `requests` in turn, one at each of `arrivals`, and wait up to `drain_s` for the last answers.

    Args:
        limit_s, allowed_late: sending stops early once more than the share `allowed_late` of all planned requests
            failed or took longer than `limit_s`, since the rest cannot change that.

    Raises:
        OSError: nothing listens at `url`.
    """
    record, loop, planned = _Record(), asyncio.get_running_loop(), arrivals.tolist()
    finished = asyncio.Event()
    seconds = 0.0
    n_late = next_index = 0
    most_late = allowed_late * len(planned)

    def on_answer(index: int, status: int, body: bytes) -> None:
        nonlocal n_late, seconds
        now_s = seconds = time.perf_counter() - started
        record.done(index, now_s, status, body)
        if status != 200 or now_s - planned[index] > limit_s:
            n_late += 1
        if record.n_done == len(planned) or (stopped() and record.n_done == len(record.statuses)):
            finished.set()

    def stopped() -> bool:
        return n_late > most_late or next_index == len(planned)

    def send_due() -> None:
        nonlocal next_index
        now_s = time.perf_counter() - started
        while next_index < len(planned) and planned[next_index] <= now_s and not n_late > most_late:
            pool.send(record.add(planned[next_index], now_s), requests[next_index % len(requests)])
            next_index += 1
        if stopped():
            sending_ended.set()
            if record.n_done == len(record.statuses):
                finished.set()
        else:
            # The event loop's timers have millisecond resolution: requests due in between are sent together, and the
            # delay counts in their latency.
            loop.call_later(max(0.001, planned[next_index] - now_s), send_due)

    sending_ended = asyncio.Event()
    pool = Pool(*_address(url), on_answer, max_connections)
    with _no_collector():
        await pool.open(8)
        cpu_s, started = time.process_time(), time.perf_counter()
        try:
            if planned:
                send_due()
                await sending_ended.wait()
                seconds = time.perf_counter() - started  # `on_answer` extends it to the last answer
                with suppress(TimeoutError):  # the rest stay UNANSWERED
                    async with asyncio.timeout(drain_s):
                        await finished.wait()
            cpu_s = time.process_time() - cpu_s
        finally:
            pool.close()
            await asyncio.sleep(0)  # aborted transports close in the next iteration
    return record.result(len(requests), seconds, cpu_s, stopped_early=next_index < len(planned))


async def closed_loop(
    url: str,
    requests: Sequence[bytes],
    n_in_flight: int,
    seconds: float,
    drain_s: float = 10.0,
) -> Result:
    """Keep `n_in_flight` requests in flight for some seconds; latency counts from sending.

    After an error status the next request waits `RETRY_S`; after a lost connection one less is kept in flight.

    Raises:
        OSError: nothing listens at `url`.
    """
    record, loop = _Record(), asyncio.get_running_loop()
    ended, stop = asyncio.Event(), asyncio.Event()
    n_senders = n_in_flight

    def on_answer(index: int, status: int, body: bytes) -> None:
        nonlocal n_senders
        record.done(index, time.perf_counter() - started, status, body)
        if status == CLOSED:
            n_senders -= 1
            if not n_senders:
                stop.set()
        elif not stop.is_set():
            if status == 200:
                send()
            else:
                loop.call_later(RETRY_S, send)
        if record.n_done == len(record.statuses):
            ended.set()

    def send() -> None:
        if stop.is_set():
            return
        now_s = time.perf_counter() - started
        index = record.add(now_s, now_s)
        pool.send(index, requests[index % len(requests)])

    pool = Pool(*_address(url), on_answer, n_in_flight)
    with _no_collector():
        await pool.open(n_in_flight)
        cpu_s, started = time.process_time(), time.perf_counter()
        timer = loop.call_later(seconds, stop.set)
        try:
            for _ in range(n_in_flight):
                send()
            await stop.wait()
            sending_s = time.perf_counter() - started
            cpu_s = time.process_time() - cpu_s
            if record.n_done < len(record.statuses):
                with suppress(TimeoutError):
                    async with asyncio.timeout(drain_s):
                        await ended.wait()
        finally:
            timer.cancel()
            pool.close()
            await asyncio.sleep(0)  # aborted transports close in the next iteration
    return record.result(len(requests), sending_s, cpu_s, stopped_early=False)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r} is not an address like http://127.0.0.1:8000/classify")
    return parts.hostname, parts.port or 80
