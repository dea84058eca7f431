"""For all tests."""

import os
from collections.abc import Generator
from pathlib import Path

# Before anything imports torch. Networks of the tests are tiny: a second thread gains nothing, and beside a busy core
# it makes every operation wait. Commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import pytest
from hypothesis import settings

from service.compiled import staleness
from tests.waiting import LIMIT_S

# Examples may take as long as a busy machine needs: no test asserts its own speed. They are the same in every run, so
# that a commit passes or fails for good; EXITSERVE_RANDOM=1 draws others.
settings.register_profile("default", deadline=None, derandomize=not os.environ.get("EXITSERVE_RANDOM"))
settings.load_profile("default")

# Nor does a client give up, as those of httpx do after 5 s unless told otherwise.
for step in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, step, LIMIT_S)


def pytest_configure() -> None:
    """Test what is written, not what was compiled before it was written."""
    if stale := staleness():
        raise pytest.UsageError(stale)


@pytest.hookimpl(wrapper=True, optionalhook=True)  # there need be no xdist for tests one by one
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One more than there are cores to use: a test waits for servers now and then."""
    return (yield) + 1


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    """A tiny real bundle of the test's own, to serve or to damage; see `tests.bundles`."""
    from tests.bundles import tiny_bundle  # here, since it takes seconds to import torch

    return tiny_bundle(tmp_path / "tiny")
