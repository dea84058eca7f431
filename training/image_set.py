"""Image sets in memory, and the split that holds images out for calibration.

Every set is held as uint8 arrays [images, height, width, 3] with int64 labels, so that it can live on the training
device and be augmented there in batches.
"""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import TrainingError


class DataError(TrainingError):
    """An image set that can't be read; the message names the path, the cause and the fix."""


@dataclass(frozen=True)
class ImageSet:
    """A labelled image set with a training and a test part, and the constants it is normalised with."""

    name: str
    train_images: np.ndarray  # uint8 [images, height, width, 3]
    train_labels: np.ndarray  # int64 [images]
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    listing: str = ""  # names of the training images, where they have any
    notes: tuple[str, ...] = ()  # remarks for the user on how they were read

    @property
    def image_size_px(self) -> int:
        return int(self.train_images.shape[1])

    @property
    def sha256(self) -> str:
        """SHA-256 of the training labels and names: a set with images added or removed needs another split."""
        return hashlib.sha256(self.train_labels.tobytes() + self.listing.encode(errors="surrogateescape")).hexdigest()

    @property
    def test_sha256(self) -> str:
        """SHA-256 of the test images' pixels and labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.test_images).data)
        digest.update(np.ascontiguousarray(self.test_labels).data)
        return digest.hexdigest()

    def described(self, split: "Split") -> dict[str, Any]:
        """What a run records of its images, to recognise them later."""
        named = {"name": self.name, "image_size_px": self.image_size_px}
        return {**named, "split_sha256": split.sha256, "images_sha256": self.sha256}


@dataclass(frozen=True)
class Split:
    """Which training images are trained on and which are held out for calibration.

    The held-out images are the last of one seeded permutation. It is stored with the run, because a new split
    would leak training images into the calibration.
    """

    train: np.ndarray  # int64 indices into the training part
    held_out: np.ndarray

    @classmethod
    def make(cls, n_images: int, n_held_out: int, seed: int) -> "Split":
        if not 0 < n_held_out < n_images:
            raise DataError(
                f"cannot hold out {n_held_out} of {n_images} training images: choose from 2 to {n_images - 1} "
                "(held_out_images of the recipe, or --set held_out_images=...)"
            )
        order = np.random.default_rng(seed).permutation(n_images).astype(np.int64)
        return cls(np.sort(order[:-n_held_out]), np.sort(order[-n_held_out:]))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.train.tobytes() + b"|" + self.held_out.tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        np.savez(path, train=self.train, held_out=self.held_out)

    @classmethod
    def load(cls, path: Path, n_images: int) -> "Split":
        """Read a stored split of `n_images` training images.

        Raises:
            DataError: it is missing or damaged, or does not place every image in exactly one part.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                split = cls(arrays["train"], arrays["held_out"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: the run's split can't be read ({error}); train into another folder") from error
        both = np.sort(np.concatenate([split.train, split.held_out]))
        if not np.array_equal(both, np.arange(n_images)):
            raise DataError(
                f"{path}: a split of {len(both)} images, but --data holds {n_images} training images; "
                "give the images that the run was started with"
            )
        return split
