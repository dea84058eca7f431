"""Reads CIFAR-100 into memory, from its official files or from strips of WebP."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.image_set import DataError, ImageSet

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
PARTS = ("train", "test", "meta")
_PICKLED_BY_CIFAR = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads the official CIFAR pickles (dictionaries, lists, strings and one array) and refuses to run other code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED_BY_CIFAR:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does: refused")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_tar(path: Path) -> ImageSet:
    """Read the official archive.

    Raises:
        DataError: it is damaged, or another archive.
    """
    parts = {}
    try:
        with tarfile.open(path) as archive:
            for part in PARTS:
                member = archive.extractfile(f"cifar-100-python/{part}")
                if member is None:
                    raise DataError(f"{path}: cifar-100-python/{part} is not a file")
                parts[part] = member.read()
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise DataError(f"{path}: not the official CIFAR-100 archive ({error}); download it again") from error
    return read_parts(parts, path)


def read_parts(parts: dict[str, bytes], source: Path) -> ImageSet:
    """Read the contents of the official files, by `PARTS`.

    Raises:
        DataError: they are damaged; the message names `source`.
    """
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


def read_strips(folder: Path) -> ImageSet:
    """Read a folder of lossless WebP strips.

    Raises:
        DataError: files are missing or damaged.
    """
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
