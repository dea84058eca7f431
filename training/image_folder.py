"""Reads a folder with one folder of pictures per class into memory, with all pictures at the same size."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from models.pixels import fitted, loaded, orientation_of
from training.image_set import DataError, ImageSet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
# Contents accepted, whatever the suffix: those that are served. Other readers of Pillow are unsafe; that of PostScript
# runs the file as a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
SET_APART = 5  # without a test folder, one in this many images of every class is a test image
MOST_NAMES = 5  # names listed in one message
Labelled = list[tuple[Path, int]]


def holds_classes(path: Path) -> bool:
    """Whether `path` has at least two folders with pictures, one per class."""
    return len(_with_pictures(path)) >= 2


def found_in(path: Path) -> str:
    """What a folder without classes has instead, for the error message; nothing for a file."""
    if not path.is_dir():
        return ""
    folders, classes = _folders_in(path), _with_pictures(path)
    there = f"only {classes[0].name}/ has" if classes else f"none of its {len(folders):,} folders has"
    return f". Here, {there} images ({', '.join(sorted(IMAGE_SUFFIXES))}) directly in it"


def _with_pictures(path: Path) -> list[Path]:
    return [folder for folder in _folders_in(path) if any(map(_is_picture, folder.iterdir()))]


def read_image_folder(root: Path, image_size_px: int) -> ImageSet:
    """Read `train/CLASS/*` and `val/CLASS/*` or `test/CLASS/*`; or `CLASS/*`, a fifth of which becomes the test part.

    Hidden files and folders are ignored, and so are files that are not pictures (with a note).

    Raises:
        DataError: classes or pictures are missing, or pictures can't be read.
    """
    name, folder, notes, unread = printable(root.resolve().name), root / "train", [], None
    if folder.is_dir() and not _is_class(folder):
        test_folder = _test_folder(root)
        if test_folder.name == "val" and (root / "test").is_dir():
            unread = root / "test"
            notes.append("val/ is read as the test images, and test/ is not read: to measure on it, rename the two")
        class_names = _class_names(folder)
        train, test = _pictures_in(folder, class_names), _test_pictures(test_folder, class_names)
    else:
        folder, class_names = root, _class_names(root)
        train, test = _set_apart(_pictures_in(root, class_names), root)
        notes = [
            f"{name} has no train/ and val/: {len(test):,} of its {len(train) + len(test):,} images, a fifth of "
            "every class, are set aside as test images"
        ]
    named = {label for _, label in train}
    if absent := [class_names[label] for label in range(len(class_names)) if label not in named]:
        raise DataError(f"{folder}: no images in {some(absent)}; add some, or remove the folder")
    read = {path for path, _ in (*train, *test)}
    present = (path for path in root.rglob("*") if path.is_file() and _is_visible(path, root))
    others = [path for path in present if path not in read and unread not in path.parents]
    if kinds := sorted({path.suffix or path.name for path in others if not _is_picture(path)}):
        n_files = sum(not _is_picture(path) for path in others)
        notes.append(f"ignored files that are not JPEG, PNG, WebP or BMP: {n_files:,} ({some(kinds)})")
    if strays := sorted(path.relative_to(root).as_posix() for path in others if _is_picture(path)):
        notes.append(f"ignored images that are not directly in a class folder: {len(strays):,} ({some(strays)})")
    damaged: dict[Path, Exception] = {}
    images = [_read(files, image_size_px, part, damaged) for files, part in ((train, "train"), (test, "test"))]
    if damaged:
        path = min(damaged)
        more = f"; so are {some([str(p) for p in sorted(damaged)[1:]])}" if len(damaged) > 1 else ""
        raise DataError(f"{path}: not a readable image ({damaged[path]}){more}; remove or replace it")
    labels = [np.asarray([label for _, label in part], np.int64) for part in (train, test)]
    return ImageSet(
        name,
        images[0],
        labels[0],
        images[1],
        labels[1],
        class_names,
        IMAGENET_MEAN,
        IMAGENET_STD,
        listing="\n".join(path.relative_to(root).as_posix() for path, _ in train),
        notes=tuple(notes),
    )


def _folders_in(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _is_class(folder: Path) -> bool:
    """Whether a folder has pictures and no folders in it: `train` may be a class (of trains), too."""
    return not _folders_in(folder) and any(map(_is_picture, folder.iterdir()))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _is_visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in _folders_in(folder))
    if len(names) < 2:
        raise DataError(f"{folder}: {len(names)} class folders; there must be at least 2")
    if strange := [ascii(name) for name in names if not name.isprintable()]:  # such as bytes that are not UTF-8
        raise DataError(f"{folder}: class folders with unprintable names: {some(strange)}; rename them")
    return names


def _pictures_in(folder: Path, class_names: Sequence[str]) -> Labelled:
    found = [
        (path, label)
        for label, name in enumerate(class_names)
        for path in sorted((folder / name).glob("*"))
        if _is_picture(path)
    ]
    if not found:
        raise DataError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in its class folders")
    return found


def _test_folder(root: Path) -> Path:
    folder = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{root}: has train/ but neither val/ nor test/; add one with a folder per class")
    return folder


def _test_pictures(folder: Path, class_names: Sequence[str]) -> Labelled:
    if strange := sorted({entry.name for entry in _folders_in(folder)} - set(class_names)):
        raise DataError(f"{folder}: {some(strange)}: no such class in train/; add images there, or remove it")
    return _pictures_in(folder, class_names)


def _set_apart(found: Labelled, root: Path) -> tuple[Labelled, Labelled]:
    """Set test images aside by a digest of their names, so that most stay in their part when the folder grows."""
    test: set[Path] = set()
    for _, of_class in groupby(found, key=lambda pair: pair[1]):
        by_digest = sorted(
            (path for path, _ in of_class), key=lambda path: hashlib.sha256(os.fsencode(path.name)).digest()
        )
        test.update(by_digest[: len(by_digest) // SET_APART])
    if not test:
        raise DataError(f"{root}: no class has {SET_APART} images, so none can be set aside as test images; add some")
    return [pair for pair in found if pair[0] not in test], [pair for pair in found if pair[0] in test]


def _read(files: Labelled, image_size_px: int, part: str, damaged: dict[Path, Exception]) -> np.ndarray:
    """Decode pictures on all cores to uint8 [images, size, size, 3]; errors are collected in `damaged`, by path."""
    try:
        images = np.empty((len(files), image_size_px, image_size_px, 3), np.uint8)
    except MemoryError:
        gigabytes = len(files) * image_size_px**2 * 3 / 1e9
        raise DataError(
            f"{len(files):,} images of {image_size_px} x {image_size_px} px take {gigabytes:.0f} GB of memory, "
            "more than is available: read them at a smaller size (--image-size), or give fewer images"
        ) from None

    def read(row: int) -> None:
        path, _ = files[row]
        try:
            with Image.open(path, formats=FORMATS) as opened:
                image = loaded(opened)
                images[row] = np.asarray(fitted(image, (image_size_px, image_size_px), orientation_of(image)))
        except Exception as error:  # Pillow raises many kinds of errors for damaged files
            damaged[path] = error

    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        # Pillow warns of images above 89 million pixels and of odd EXIF data, without naming the file, and reads them.
        warnings.filterwarnings("ignore", module="PIL")
        try:
            for _ in tqdm(pool.map(read, range(len(files))), f"reading {part}", len(files), unit="image", disable=None):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C, don't read the rest first
            raise
    return images


def some(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return printable(", ".join(names[:MOST_NAMES])) + more


def printable(name: str) -> str:
    """A file's name for the terminal: bytes that are not UTF-8 are escaped."""
    return name.encode(errors="backslashreplace").decode()
