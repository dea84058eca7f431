"""Image sets in memory, and the split that holds images out for calibration.

Every set is held as uint8 arrays [images, height, width, 3] with int64 labels, so that it can live on the training
device and be augmented there in batches.
"""

import hashlib
import io
import pickle
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.errors import TrainingError

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    notes: tuple[str, ...] = ()  # what a person should know of how they were read

    @property
    def image_size_px(self) -> int:
        return int(self.train_images.shape[1])

    @property
    def sha256(self) -> str:
        """Of the training images' labels and names: a split of a set to which images came or went is another one."""
        return hashlib.sha256(self.train_labels.tobytes() + self.listing.encode(errors="surrogateescape")).hexdigest()

    def described(self, split: "Split") -> dict[str, Any]:
        """What a run keeps of its images, to know them again."""
        named = {"name": self.name, "image_size_px": self.image_size_px}
        return {**named, "split_sha256": split.sha256, "images_sha256": self.sha256}


@dataclass(frozen=True)
class Split:
    """Which training images are trained on and which are held out for calibration.

    The held-out images are the last of one seeded permutation. It is stored with the run, because a split made anew
    would leak training images into the calibration.
    """

    train: np.ndarray  # int64 indices into the training part
    held_out: np.ndarray

    @classmethod
    def make(cls, n_images: int, n_held_out: int, seed: int) -> "Split":
        if not 0 < n_held_out < n_images:
            raise DataError(
                f"cannot hold out {n_held_out} of {n_images} training images: choose from 1 to {n_images - 1} "
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


def load_image_set(path: Path, image_size_px: int = 224) -> ImageSet:
    """Read the image set at `path`, whatever its form.

    Forms: CIFAR-100 as the official `cifar-100-python.tar.gz`, its unpacked folder, or a folder of lossless WebP strips
    (`cifar100-images-*.zip` with `cifar100-labels.npz`); and a folder of pictures, read at `image_size_px` (shorter
    side resized, centre cropped), see `training.image_folder`.

    Raises:
        DataError: nothing of these forms is there, or it is damaged.
    """
    from training.image_folder import holds_classes, read_image_folder  # which makes an `ImageSet`, too

    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give CIFAR-100's tar.gz or folder, or an image folder")
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _cifar100_from_tar(path)
    for folder in (path, path / "cifar-100-python"):
        if (folder / "train").is_file() and (folder / "meta").is_file():
            return _cifar100_from_parts(
                {part: (folder / part).read_bytes() for part in ("train", "test", "meta")}, folder
            )
    tar = path / "cifar-100-python.tar.gz"
    if tar.is_file():
        return _cifar100_from_tar(tar)
    if (path / "cifar100-labels.npz").is_file():
        return _cifar100_from_strips(path)
    if path.is_dir() and ((path / "train").is_dir() or holds_classes(path)):
        return read_image_folder(path, image_size_px)
    raise DataError(
        f"{path}: not an image set this reads. Expected cifar-100-python.tar.gz, its folder (train, test, meta), "
        "or an image folder with train/CLASS/ and val/CLASS/, or with CLASS/ alone"
    )


_PICKLED_BY_CIFAR = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads the official CIFAR pickles, which hold only dictionaries, lists, strings and one numpy array."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED_BY_CIFAR:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does: refused")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _cifar100_from_tar(path: Path) -> ImageSet:
    parts = {}
    try:
        with tarfile.open(path) as archive:
            for part in ("train", "test", "meta"):
                member = archive.extractfile(f"cifar-100-python/{part}")
                if member is None:
                    raise DataError(f"{path}: cifar-100-python/{part} is not a file")
                parts[part] = member.read()
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise DataError(f"{path}: not the official CIFAR-100 archive ({error}); download it again") from error
    return _cifar100_from_parts(parts, path)


def _cifar100_from_parts(parts: dict[str, bytes], source: Path) -> ImageSet:
    try:
        content = {name: _ArraysOnly(io.BytesIO(data), encoding="bytes").load() for name, data in parts.items()}
        images = {
            part: np.ascontiguousarray(content[part][b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            for part in ("train", "test")
        }
        labels = {part: np.asarray(content[part][b"fine_labels"], np.int64) for part in ("train", "test")}
        names = [name.decode() for name in content["meta"][b"fine_label_names"]]
        return _cifar100(images, labels, names)
    except (pickle.UnpicklingError, LookupError, EOFError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{source}: damaged CIFAR-100 file ({error}); download the archive again") from error


def _cifar100_from_strips(folder: Path) -> ImageSet:
    strips: dict[str, np.ndarray] = {}
    try:
        for archive in sorted(folder.glob("cifar100-images-*.zip")):
            with zipfile.ZipFile(archive) as members:
                for name in members.namelist():
                    strips[name] = np.asarray(Image.open(io.BytesIO(members.read(name))).convert("RGB"))
        images = {}
        for part in ("train", "test"):
            rows = [strips[name] for name in sorted(strips) if name.startswith(part)]
            images[part] = np.concatenate(rows or [np.empty((0, 32, 3), np.uint8)]).reshape(-1, 32, 32, 3)
        with (folder / "cifar100-labels.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            labels = {part: arrays[f"{part}_labels"].astype(np.int64) for part in ("train", "test")}
            names = [str(name) for name in arrays["class_names"]]
        return _cifar100(images, labels, names)
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, EOFError) as error:
        raise DataError(f"{folder}: damaged or incomplete ({error}); copy all its files there again") from error


def _cifar100(images: dict[str, np.ndarray], labels: dict[str, np.ndarray], names: list[str]) -> ImageSet:
    for part in ("train", "test"):
        if len(images[part]) != len(labels[part]) or not len(labels[part]) or images[part].dtype != np.uint8:
            raise ValueError(f"{len(images[part])} {part} images and {len(labels[part])} labels")
        if labels[part].min() < 0 or labels[part].max() >= len(names):
            raise ValueError(f"{part} labels outside the {len(names)} classes")
    train, test = ((images[part], labels[part]) for part in ("train", "test"))
    return ImageSet("cifar100", *train, *test, names, CIFAR100_MEAN, CIFAR100_STD)
