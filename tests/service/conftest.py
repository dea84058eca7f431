"""Fixtures of all tests of the service."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from models.bundle import Bundle, load_bundle

if TYPE_CHECKING:
    from tests.service.browser import Browser
    from tests.service.fronts import Front
    from tests.service.sockets import Here, Line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real bundle, shared by a file's tests, which must not change it; `bundle_path` is private to a test."""
    from tests.bundles import tiny_bundle  # imported here, as it imports torch, which takes seconds

    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, loaded."""
    return load_bundle(folder)


@pytest.fixture(scope="module")
def here(folder: Path) -> "Iterator[Here]":
    """A server of that bundle on a real socket, shared by a file's tests."""
    from tests.service.sockets import serving

    with serving(folder) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A real browser, shared by a file's tests."""
    from tests.service.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def line(here: "Here") -> "Iterator[Line]":
    """A connection to that server."""
    line = here.connect()
    yield line
    line.close()


@pytest.fixture
def front(bundle_path: Path) -> "Iterator[Front]":
    """Two proxies in front of one engine."""
    from tests.service.fronts import Front

    front = Front(bundle_path)
    yield front
    front.close()
