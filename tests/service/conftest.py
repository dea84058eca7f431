"""For all tests of the service."""

from pathlib import Path

import pytest

from models.bundle import Bundle, load_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real bundle, which the tests of a file share and leave as it is; `bundle_path` is one of a test's own."""
    from tests.bundles import tiny_bundle  # here, since it takes seconds to import torch

    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    """The same, loaded."""
    return load_bundle(folder)
