"""Sends good, bad, slow and abandoned requests to a real server, mixed: `python -m tests.promises.chaos --help`."""

import argparse
import asyncio
import io
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import httpx
import numpy as np
from PIL import Image

from tests.service.process import REPOSITORY, ServerProcess, running_server

N_CLIENTS = 32
PAUSE_S = 0.05  # of a slow client between two parts of its body
SAMPLE_EVERY_S = 1.0
SETTLE_S = 30.0


def picture(size_px: int, file_format: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


SMALL = picture(32, "PNG", 1)
LARGE = picture(256, "BMP", 2)  # 192 KiB: if bodies leaked, a few hundred would show in memory
BROKEN = SMALL[: len(SMALL) // 2]
PNG, BMP = {"Content-Type": "image/png"}, {"Content-Type": "image/bmp"}


class KeptConnections(httpx.AsyncHTTPTransport):
    """Resends a request if its connection was reused and ended before any byte of the answer.

    A server may close an idle connection at any time, even while a request is on its way (RFC 9112, 9.5). Clients,
    among them `service.client`, resend it.

    Attributes:
        n_again: number of resent requests.
    """

    def __init__(self, limits: httpx.Limits) -> None:
        super().__init__(limits=limits)
        self.n_again = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        seen: set[str] = set()

        async def trace(event: str, info: object) -> None:
            seen.add(event)

        request.extensions = {**request.extensions, "trace": trace}
        while True:
            try:
                return await super().handle_async_request(request)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                was_new = "connection.connect_tcp.started" in seen
                if was_new or "http11.receive_response_headers.complete" in seen:
                    raise
                self.n_again += 1


@dataclass
class Usage:
    """Resources of a process, measured from outside."""

    rss_kib: int
    fds: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        n_fds = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (no pathlib function counts as cheaply)
        return cls(int(status["VmRSS"].split()[0]), n_fds, int(status["Threads"]))


@dataclass
class Clients:
    """Clients of all kinds; outcomes of requests are counted by kind."""

    server: ServerProcess
    http: httpx.AsyncClient
    seed: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        one = (("image", ("a.png", SMALL, "image/png")),)
        mixed = [("image", (name, body, "image/png")) for name, body in (("a", SMALL), ("b", BROKEN), ("c", SMALL))]
        self.kinds: list[tuple[int, str, Callable[[], Awaitable[bool]]]] = [
            (30, "good", lambda: self._post(200, "/classify", content=SMALL, headers=PNG)),
            (15, "good and large", lambda: self._post(200, "/classify", content=LARGE, headers=BMP)),
            (5, "good, in a form", lambda: self._post(200, "/classify", files=one)),
            (5, "good, in lines", lambda: self._post(200, "/classify/stream", content=SMALL, headers=PNG)),
            (3, "two good and one bad together", lambda: self._batch(mixed)),
            (4, "with a deadline", lambda: self._post(200, "/classify?deadline_ms=30000", content=SMALL, headers=PNG)),
            (2, "with a deadline too short", self._in_a_hurry),
            (6, "broken", lambda: self._post(400, "/classify", content=BROKEN, headers=PNG)),
            (
                3,
                "no image",
                lambda: self._post(415, "/classify", content=b"{}", headers={"Content-Type": "text/plain"}),
            ),
            (3, "misspelt", lambda: self._post(422, "/classify?topk=1", content=SMALL, headers=PNG)),
            (3, "too large", lambda: self._raw(self._head(10**9))),
            (3, "junk", lambda: self._raw(self.random.randbytes(200))),
            (6, "slow", lambda: self._slowly(SMALL, whole=True)),
            (4, "slow, gone halfway", lambda: self._slowly(SMALL, whole=False)),
            (8, "gone before the answer", lambda: self._raw(self._head(len(LARGE), "bmp") + LARGE, wait=False)),
            (2, "another budget", self._budget),
        ]

    async def run(self, n_requests: int, until_s: float = 0.0) -> None:
        """Send at least so many requests, and until the given time, concurrently and in random order."""
        weights = [weight for weight, _, _ in self.kinds]
        n_left = n_requests

        async def client() -> None:
            nonlocal n_left
            while n_left > 0 or monotonic() < until_s:
                n_left -= 1
                _, name, ask = self.random.choices(self.kinds, weights)[0]
                try:
                    as_expected = await ask()
                except (httpx.HTTPError, OSError) as error:
                    as_expected = False
                    self.surprises.append(f"{name}: {error!r}")
                self.ended[name if as_expected else f"{name}, refused"] += 1

        await asyncio.gather(*(client() for _ in range(N_CLIENTS)))

    async def _post(self, status: int, path: str, **options: object) -> bool:
        response = await self.http.post(path, **options)  # type: ignore[arg-type]
        if response.status_code not in (status, 429):
            self.surprises.append(f"{path}: {response.status_code} {response.text[:200]}")
        return response.status_code == status

    async def _batch(self, files: list[tuple[str, tuple[str, bytes, str]]]) -> bool:
        response = await self.http.post("/classify/batch", files=files)
        if response.status_code == 429:
            return False
        document = response.json()
        if response.status_code != 200:
            self.surprises.append(f"batch: {document}")
            return False
        found = [item["answer"] is not None or item["problem"]["status"] == 429 for item in document["results"]]
        if found != [True, False, True]:
            self.surprises.append(f"batch: {document}")
        return document["failed"] == 1

    async def _in_a_hurry(self) -> bool:
        response = await self.http.post("/classify?deadline_ms=1&exit=1", content=SMALL, headers=PNG)
        if response.status_code not in (200, 429, 504):
            self.surprises.append(f"in a hurry: {response.status_code} {response.text[:200]}")
        return response.status_code in (200, 504)

    async def _budget(self) -> bool:
        response = await self.http.put("/budget", json={"fraction": round(self.random.uniform(0.35, 1.0), 3)})
        return response.status_code == 200

    async def _slowly(self, body: bytes, whole: bool) -> bool:
        """Send a body in parts; leave after half of it unless `whole`."""
        parts = [body[i : i + 700] for i in range(0, len(body), 700)]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            writer.write(self._head(len(body)))
            for part in parts if whole else parts[: len(parts) // 2]:
                writer.write(part)
                await asyncio.sleep(PAUSE_S)
            return not whole or (await reader.readline()).startswith(b"HTTP/1.1 200")
        finally:
            writer.transport.abort()

    async def _raw(self, data: bytes, wait: bool = True) -> bool:
        """Send bytes and hang up, either at once or after the answer, which must not be a 5xx."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            writer.write(data)
            await writer.drain()
            if wait:
                writer.write_eof()
                status = await reader.readline()
                if status.startswith((b"HTTP/1.1 2", b"HTTP/1.1 5")):
                    self.surprises.append(f"to bytes that are no request: {status!r}")
            return True
        finally:
            writer.transport.abort()

    def _head(self, n_bytes: int, kind: str = "png") -> bytes:
        head = f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/{kind}\r\nContent-Length: {n_bytes}"
        return head.encode() + b"\r\n\r\n"


def slope(samples: list[tuple[float, float]], n_blocks: int = 20) -> tuple[float, float]:
    """Fit a line through (seconds, value) samples; returns its slope per minute and the standard error.

    Neighbouring samples are correlated, so the line is fitted to the means of `n_blocks` blocks, which are less so.
    """
    blocks = np.array([np.mean(block, axis=0) for block in np.array_split(np.array(samples), n_blocks) if len(block)])
    minutes, values = blocks[:, 0] / 60, blocks[:, 1]
    design = np.stack([minutes, np.ones_like(minutes)], axis=1)
    (per_minute, start), *_ = np.linalg.lstsq(design, values)
    residuals = values - per_minute * minutes - start
    error = np.sqrt((residuals**2).sum() / (len(values) - 2) / ((minutes - minutes.mean()) ** 2).sum())
    return float(per_minute), float(error)


async def untouched_is_answered(server: ServerProcess) -> bool:
    """Check that a request on a new connection is answered, after all the others."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        response = await http.post("/classify", content=SMALL, headers=PNG)
        return response.status_code == 200 and "label" in response.json()


async def settled(server: ServerProcess, before: Usage) -> Usage:
    """The server's resources once it has released those of abandoned requests."""
    limit_s = monotonic() + SETTLE_S
    while (now := Usage.of(server.process.pid)).fds > before.fds and monotonic() < limit_s:
        await asyncio.sleep(0.1)
    return now


def _tenths(samples: list[tuple[float, Usage]]) -> list[float]:
    parts = np.array_split([usage.rss_kib / 1024 for _, usage in samples], 10)
    return [round(float(part.mean()), 1) for part in parts if len(part)]


async def storm(
    server: ServerProcess, n_requests: int, minutes: float, seed: int, idle_s: float = 2.0
) -> dict[str, object]:
    """Send all requests and monitor the server meanwhile; returns the samples.

    Args:
        idle_s: how long clients keep idle connections.
    """
    pid, started_s = server.process.pid, monotonic()
    samples: list[tuple[float, Usage]] = []
    done = asyncio.Event()

    async def watch() -> None:
        while not done.is_set():
            samples.append((monotonic() - started_s, Usage.of(pid)))
            await asyncio.sleep(SAMPLE_EVERY_S)

    assert await untouched_is_answered(server)
    before = Usage.of(pid)
    watching = asyncio.create_task(watch())
    limits = httpx.Limits(max_connections=N_CLIENTS, max_keepalive_connections=N_CLIENTS, keepalive_expiry=idle_s)
    transport = KeptConnections(limits)
    async with httpx.AsyncClient(base_url=server.url, transport=transport, timeout=60) as http:
        clients = Clients(server, http, seed)
        await clients.run(n_requests, started_s + 60 * minutes)
    done.set()
    await watching
    after = await settled(server, before)
    answered = await untouched_is_answered(server)
    # Allocators and thread pools grow first, so only the second half counts.
    later = [(seconds, float(usage.rss_kib)) for seconds, usage in samples[len(samples) // 2 :]]
    per_minute, error = slope(later) if len(later) >= 40 else (float("nan"), float("nan"))
    return {
        "requests": dict(sorted(clients.ended.items())),
        "sent": clients.ended.total(),
        "seconds": round(monotonic() - started_s, 1),
        "surprises": clients.surprises[:20],
        "sent again, an idle connection having ended": transport.n_again,
        "untouched request answered": answered,
        "rss before, MiB": round(before.rss_kib / 1024, 1),
        "rss by tenths of the time, MiB": _tenths(samples),
        "rss after, MiB": round(after.rss_kib / 1024, 1),
        "rss slope in the second half, KiB/min": round(per_minute, 1),
        "its standard error": round(error, 1),
        "file descriptors before, at most, after": [before.fds, max(usage.fds for _, usage in samples), after.fds],
        "threads before, at most, after": [before.threads, max(u.threads for _, u in samples), after.threads],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.promises.chaos",
        description="Start a server, send it good, bad, slow and abandoned requests, all mixed, and see that it still "
        "answers, says nothing wrong, and holds no more memory, descriptors and threads than before. Prints what was "
        "seen as JSON; exit code 1 where something was not as it should be.",
    )
    parser.add_argument("--bundle", type=Path, default=REPOSITORY / "models/zoo/cifar100-msdnet")
    parser.add_argument("--requests", type=int, default=10_000, help="at least so many")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="at least so long; memory grows to its size first, so give 20 for a slope over 10",
    )
    parser.add_argument("--max-slope", type=float, default=200.0, help="of resident memory, KiB a minute")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running_server(options.bundle, log, "--access-log", "off") as server:
            seen = asyncio.run(storm(server, options.requests, options.minutes, options.seed))
            seen["exit code on SIGTERM"] = code = server.stop()
        n_traces = log.read_text().count("Traceback")
    print(json.dumps({**seen, "traces in the log": n_traces}, indent=2))
    per_minute, error = (
        float(str(seen["rss slope in the second half, KiB/min"])),
        float(str(seen["its standard error"])),
    )
    grows = per_minute - 3 * error > options.max_slope
    return 1 if grows or code or n_traces or seen["surprises"] or not seen["untouched request answered"] else 0


if __name__ == "__main__":
    sys.exit(main())
