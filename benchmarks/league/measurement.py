"""The measurement of one server in one round."""

import asyncio
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.league.pictures import Pictures
from benchmarks.league.processes import Tree
from benchmarks.league.roster import Peer, Places, environment
from benchmarks.load.arrivals import poisson
from benchmarks.load.connection import http_request
from benchmarks.load.loops import closed_loop, open_loop
from benchmarks.load.result import Result

START_S = 120.0  # a server must answer within this time
IN_FLIGHT = 64  # in the closed loop whose rate the search starts from
CLIENTS, LEAVING = 40, 36
LEAVE_AFTER_S = 0.01
STOP_S = 30.0  # after SIGTERM, a server must have ended within this time


class PeerError(Exception):
    """A server cannot be measured; the message has the reason and the end of its log."""


@dataclass(frozen=True)
class Plan:
    """How long and how finely to measure."""

    seconds: float  # duration of one run at one rate
    warm_up_s: float
    limit_ms: float  # of the 99th percentile of latency
    max_points: int  # most rates to try in the search for the highest
    resolution: float  # stop when the highest passing and the lowest failing rate are this close (1.05: 5 %)


@dataclass
class Finding:
    """Results of one server in one round. Latencies are in ms from when a request was due to be sent."""

    start_s: float  # until its first answer
    closed_loop_per_s: float
    max_rate_per_s: float = 0.0  # the highest offered rate with p99 within the limit; 0: no rate tried was
    at_50: dict[str, float] = field(default_factory=dict)  # at 50 % of it: rate_per_s, p50_ms, p99_ms, failures
    at_80: dict[str, float] = field(default_factory=dict)
    cpu_ms_per_image: float = 0.0  # of all its processes, at 80 %
    client_cpu_us_per_image: float = 0.0
    accuracy: float | None = None  # over all answers of the runs above; None: no labels
    n_judged: int = 0
    mmacs_per_answer: float = 0.0  # millions of multiply-adds
    after_hang_up_ms: float = 0.0  # see `_hang_up`
    lost_at_stop: int = 0  # of 40 in flight at SIGTERM: no answer at all, or an error other than 503
    refused_at_stop: int = 0  # answered with 503
    stop_s: float | None = None  # from SIGTERM to its end; None: it had to be killed
    memory_mib: float = 0.0  # maximum, sampled between runs
    points: list[dict[str, Any]] = field(default_factory=list)  # every rate tried in the search

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Measurement:
    """Starts, measures and stops one server."""

    def __init__(self, peer: Peer, places: Places, pictures: Pictures, full_mmacs: float, plan: Plan) -> None:
        self.peer, self.pictures, self.plan, self.full_mmacs = peer, pictures, plan, full_mmacs
        self.url = f"http://127.0.0.1:{places.setup.port}{peer.path}"
        self.requests = [http_request(self.url, file, pictures.content_type, peer.headers) for file in pictures.files]
        self._places = places
        self._n_right = 0
        self._mmacs: list[float] = []
        self._seed = 0

    def run(self, log: Path, start_rate_per_s: float | None) -> Finding:
        """Start the server, measure it and stop it.

        Args:
            log: file for its output.
            start_rate_per_s: where the search for the highest rate starts; None: near the closed loop's rate.

        Raises:
            PeerError: it does not start, or fails under load.
        """
        started_s = time.monotonic()
        tree = Tree.start(self.peer.command(self._places), environment(self.peer, self._places), log)
        try:
            return uvloop.run(self._measure(tree, started_s, start_rate_per_s))
        except PeerError:
            raise
        except Exception as error:  # one server's failure must not end the comparison
            raise PeerError(f"{type(error).__name__}: {error}; its log ends: {_tail(log)}") from error
        finally:
            tree.kill()

    async def _measure(self, tree: Tree, started_s: float, start_rate_per_s: float | None) -> Finding:
        await self._first_answer(tree)
        start_s = time.monotonic() - started_s
        await closed_loop(self.url, self.requests, IN_FLIGHT, self.plan.warm_up_s)
        closed = await closed_loop(self.url, self.requests, IN_FLIGHT, self.plan.seconds)
        # A slow server may answer only after `seconds`, a rate of 0, but the search needs a positive one.
        found = Finding(start_s, max(closed.achieved_rate, 1 / self.plan.seconds))
        if not closed.answered.any():
            raise PeerError(f"it answers no request under load ({closed.failures}); its log ends: {_tail(tree.log)}")
        self._judge(closed)
        found.memory_mib = tree.memory_mib()
        found.max_rate_per_s = await self._highest_rate(tree, found, start_rate_per_s or 0.9 * found.closed_loop_per_s)
        capacity = found.max_rate_per_s or found.closed_loop_per_s
        for share, into in ((0.5, found.at_50), (0.8, found.at_80)):
            cpu_s = tree.cpu_s()
            result = await self._at_rate(share * capacity, whole=True)
            found.cpu_ms_per_image = 1e3 * (tree.cpu_s() - cpu_s) / max(1, int(result.answered.sum()))
            found.client_cpu_us_per_image = 1e6 * result.client_cpu_s / max(1, result.n_sent)
            into.update(
                rate_per_s=share * capacity,
                p50_ms=result.percentile_ms(50),
                p99_ms=result.percentile_ms(99),
                failures=sum(result.failures.values()),
            )
            self._judge(result)
        found.memory_mib = max(found.memory_mib, tree.memory_mib())
        found.after_hang_up_ms = await self._hang_up()
        found.memory_mib = max(found.memory_mib, tree.memory_mib())
        await self._stop(tree, found)
        found.n_judged = len(self._mmacs)
        found.mmacs_per_answer = float(np.mean(self._mmacs))
        found.accuracy = None if self.pictures.labels is None else self._n_right / found.n_judged
        return found

    async def _first_answer(self, tree: Tree) -> None:
        deadline_s = time.monotonic() + START_S
        while tree.exit_code is None and time.monotonic() < deadline_s:
            try:
                result = await closed_loop(self.url, self.requests[:1], 1, 0.001, drain_s=10)
            except OSError:
                result = None
            if result is not None and result.answered.any():
                return
            await asyncio.sleep(0.1)
        raise PeerError(f"it did not start; its log ends: {_tail(tree.log)}")

    async def _at_rate(self, rate: float, whole: bool) -> Result:
        """One run at `rate`; unless `whole`, it ends as soon as it is certain to miss the limit."""
        self._seed += 1
        arrivals = poisson(rate, self.plan.seconds, self._seed)
        if whole:
            return await open_loop(self.url, self.requests, arrivals, drain_s=5)
        limit_s = self.plan.limit_ms / 1e3
        return await open_loop(self.url, self.requests, arrivals, drain_s=5, limit_s=limit_s, allowed_late=0.01)

    async def _highest_rate(self, tree: Tree, found: Finding, rate: float) -> float:
        """Step up or down from `rate` until one rate passes and one fails, then bisect between them."""
        passing, failing = 0.0, float("inf")
        for _ in range(self.plan.max_points):
            result = await self._at_rate(rate, whole=False)
            p99_ms = float("inf") if result.stopped_early or not result.n_sent else result.percentile_ms(99)
            found.points.append({"rate_per_s": rate, "p99_ms": p99_ms, "failures": result.failures})
            found.memory_mib = max(found.memory_mib, tree.memory_mib())
            if p99_ms <= self.plan.limit_ms:
                passing = max(passing, rate)
                self._judge(result)
            else:
                failing = min(failing, rate)
            if tree.exit_code is not None:
                raise PeerError(f"it ended under load; its log ends: {_tail(tree.log)}")
            if failing == float("inf"):
                rate = passing * 1.12
            elif passing == 0:
                rate = failing * 0.75
            elif failing / passing <= self.plan.resolution:
                break
            else:
                rate = (passing + failing) / 2
        return passing

    def _judge(self, result: Result) -> None:
        """Add the answers of a run to the accuracy and the mean cost."""
        labels = self.pictures.labels
        for i in np.flatnonzero(result.answered):
            answer = self.peer.read(result.bodies[i])
            self._mmacs.append(self.full_mmacs if answer.mflops is None else answer.mflops)
            if labels is not None:
                self._n_right += answer.class_id == labels[int(result.image_index[i])]

    async def _hang_up(self, repeats: int = 5) -> float:
        """Median latency in ms of a new request that is sent just after 36 of 40 clients have hung up."""
        times = []
        for _ in range(repeats):
            clients = [await _connect(self.url) for _ in range(CLIENTS)]
            for (_, writer), request in zip(clients, _cycle(self.requests, CLIENTS), strict=True):
                writer.write(request)
            await asyncio.sleep(LEAVE_AFTER_S)
            for _, writer in clients[:LEAVING]:
                writer.transport.abort()
            result = await closed_loop(self.url, self.requests[-1:], 1, 0.001, drain_s=30)
            times.append(result.percentile_ms(50))
            for _, writer in clients[LEAVING:]:
                writer.transport.abort()
            await asyncio.sleep(0.3)
        return statistics.median(times)

    async def _stop(self, tree: Tree, found: Finding) -> None:
        """Send SIGTERM while 40 requests are in flight; count those lost, and time the stop."""
        clients = [await _connect(self.url) for _ in range(CLIENTS)]
        for (_, writer), request in zip(clients, _cycle(self.requests, CLIENTS), strict=True):
            writer.write(request)
        await asyncio.sleep(0.005)
        stopped_s = time.monotonic()
        tree.terminate()
        statuses = await asyncio.gather(*(_status(reader) for reader, _ in clients))
        found.refused_at_stop = statuses.count(503)
        found.lost_at_stop = CLIENTS - found.refused_at_stop - statuses.count(200)
        for _, writer in clients:
            writer.transport.abort()
        ended = await asyncio.get_running_loop().run_in_executor(None, tree.wait, STOP_S)
        found.stop_s = time.monotonic() - stopped_s if ended else None


def _cycle(requests: Sequence[bytes], n: int) -> list[bytes]:
    return [requests[i % len(requests)] for i in range(n)]


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.split("/")[2].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return reader, writer


async def _status(reader: asyncio.StreamReader) -> int:
    """Status of the answer; 0 if the connection ended or no answer came in time."""
    try:
        async with asyncio.timeout(STOP_S):
            line = await reader.readline()
            return int(line.split()[1]) if line else 0
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0


def _tail(log: Path, n_characters: int = 600) -> str:
    text = log.read_text(errors="replace").strip()
    return text[-n_characters:] or "(empty)"
