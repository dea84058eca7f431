"""Promise 7 in short: after a storm of mixed requests a good one is answered, and no resources have leaked.

`python -m tests.promises.chaos --minutes 10` is the long version.
"""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from tests.promises.chaos import Usage, settled, slope, storm
from tests.service.process import running_server

N_REQUESTS = 300  # a third have bodies of 192 KiB: 15 MiB if they leaked
MOST_GROWTH_KIB = 8 * 1024


def test_after_a_storm_the_server_holds_no_more_resources(bundle_path: Path, tmp_path: Path) -> None:
    with running_server(bundle_path, tmp_path / "log", "--device", "cpu", "--lanes", "2") as server:
        asyncio.run(storm(server, N_REQUESTS, minutes=0.0, seed=1))  # pools and buffers have grown after this one
        before = Usage.of(server.process.pid)
        seen = asyncio.run(storm(server, N_REQUESTS, minutes=0.0, seed=2))
        after = asyncio.run(settled(server, before))
        assert seen["surprises"] == []
        assert seen["sent"] >= N_REQUESTS
        assert seen["untouched request answered"]
        assert after.fds <= before.fds
        assert after.threads <= before.threads + 8  # the pool that decodes large images and waits for the engine
        assert after.rss_kib - before.rss_kib < MOST_GROWTH_KIB
        assert server.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_connections_closed_while_idle_cause_no_errors(bundle_path: Path, tmp_path: Path) -> None:
    """The server's idle timeout is as short as its clients' pauses, so some requests meet a closing connection."""
    with running_server(bundle_path, tmp_path / "log", "--device", "cpu", "--keep-alive-s", "0.01") as server:
        seen = asyncio.run(storm(server, N_REQUESTS, minutes=0.0, seed=3, idle_s=60.0))
        assert seen["surprises"] == []
        assert server.stop() == 0


def test_a_slope_is_estimated_with_its_error() -> None:
    seconds = np.arange(600.0)
    noise = np.random.default_rng(0).normal(0, 100, 600)
    flat, flat_error = slope(list(zip(seconds, 5_000 + noise, strict=True)))
    assert abs(flat) < 3 * flat_error
    grown, error = slope(list(zip(seconds, 5_000 + noise + seconds, strict=True)))  # 60 per minute
    assert grown == pytest.approx(60, abs=4 * error)
    assert error < 10
