"""Finds the real images; tests that need them are skipped, with the reason, if they are absent."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from training.data import load_image_set

REPOSITORY = Path(__file__).resolve().parents[1]


def data_folder() -> Path:
    """CIFAR-100 as `training.data.load_image_set` takes it: EXITSERVE_DATA, or `../shared/data` beside the repository.

    Skips the calling test if neither exists.
    """
    named = os.environ.get("EXITSERVE_DATA")
    path = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not path.exists():
        pytest.skip(f"no image set: {path} does not exist; set EXITSERVE_DATA to CIFAR-100's tar.gz or folder")
    return path


@cache
def cifar100_test() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test images, uint8 [10000, 32, 32, 3], and their labels, int64 [10000]; read once per session.

    Both are read-only, since all tests share them.
    """
    images = load_image_set(data_folder())
    if images.name != "cifar100":
        pytest.skip(f"{data_folder()} holds {images.name}; this test wants CIFAR-100")
    images.test_images.flags.writeable = images.test_labels.flags.writeable = False
    return images.test_images, images.test_labels
