"""Configuration and fixtures of all tests."""

import os
from collections.abc import Generator
from pathlib import Path

# Set before torch is imported, and inherited by the commands that tests start. The tests' networks are tiny: a second
# thread gains nothing, and delays every operation if its core is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import pytest
from hypothesis import settings

from service.compiled import staleness
from tests.waiting import LIMIT_S

# Examples have no deadline, since no test asserts speed. They are the same in every run, so that a commit's result is
# reproducible; EXITSERVE_RANDOM=1 draws others.
settings.register_profile("default", deadline=None, derandomize=not os.environ.get("EXITSERVE_RANDOM"))
settings.load_profile("default")

# For the same reason clients wait longer than httpx's default of 5 s.
for step in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, step, LIMIT_S)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all but the tests that need one; refuse compiled modules that are older than their sources."""
    # Servers and training runs choose a GPU by themselves if there is one, and what the other tests expect of them (the
    # runner, the number of processes, how soon they start) is a CPU's. Set before CUDA starts, and inherited, as above.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if stale := staleness():
        raise pytest.UsageError(stale)


@pytest.hookimpl(wrapper=True, optionalhook=True)  # xdist need not be installed
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One worker more than there are usable cores, because tests sometimes wait for servers."""
    return (yield) + 1


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    """A tiny real bundle that the test may change or damage; see `tests.bundles`."""
    from tests.bundles import tiny_bundle  # imported here, as it imports torch, which takes seconds

    return tiny_bundle(tmp_path / "tiny")
