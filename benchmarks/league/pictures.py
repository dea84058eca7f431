"""The image files that are sent to every server, with their labels where known."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.processes import SAMPLES
from models.bundle import Bundle
from training.data import load_image_set
from training.image_folder import IMAGE_SUFFIXES
from training.image_set import DataError

SMALL_PX = 64  # networks up to this size are sent PNG, larger ones JPEG
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Pictures:
    """Encoded images of the network's input size."""

    description: str
    content_type: str
    files: Sequence[bytes]
    labels: Sequence[int] | None  # None: unknown


def read_pictures(bundle: Bundle, folders: Sequence[Path], n_images: int) -> Pictures:
    """Up to `n_images` random test images (fixed seed) of the first of `folders` with the bundle's classes.

    A folder is an image folder with `val/CLASS/` or `test/CLASS/`, whose files are sent unchanged if their size and
    format fit, or an image set as for training, such as CIFAR-100. If none matches, the bundled sample images are used,
    scaled and without labels.

    Raises:
        DataError: a folder is not an image set.
    """
    size = bundle.manifest.input
    rng = np.random.default_rng(0)
    for folder in folders:
        tests = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
        if tests is not None:
            if sorted(path.name for path in tests.iterdir() if path.is_dir()) != sorted(bundle.manifest.class_names):
                continue
            found = [path for path in sorted(tests.glob("*/*")) if path.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                raise DataError(f"{tests}: no images in its class folders")
            paths = [found[i] for i in rng.permutation(len(found))[:n_images]]
            labels = [bundle.manifest.class_names.index(path.parent.name) for path in paths]
            kind = _kind(size.width_px)
            files = [_file_of(path, size.width_px, size.height_px, kind) for path in paths]
            return Pictures(_described(f"test images of {folder.name}", size.width_px), _type(kind), files, labels)
        images = load_image_set(folder, size.height_px)
        if images.class_names == bundle.manifest.class_names and images.image_size_px == size.height_px:
            chosen = rng.permutation(len(images.test_images))[:n_images]
            return _encoded(
                f"test images of {images.name}",
                [images.test_images[i] for i in chosen],
                [int(images.test_labels[i]) for i in chosen],
            )
    pixels = [
        np.asarray(Image.open(path).convert("RGB").resize((size.width_px, size.height_px)))
        for path in sorted(SAMPLES.glob("*.png"))
    ]
    return _encoded("SAMPLE PICTURES, scaled (no headline)", pixels, None)


def _kind(width_px: int) -> str:
    return "PNG" if width_px <= SMALL_PX else "JPEG"


def _type(kind: str) -> str:
    return f"image/{kind.lower()}"


def _described(name: str, width_px: int) -> str:
    return f"{name}, {width_px}-px {_kind(width_px)}"


def _file_of(path: Path, width_px: int, height_px: int, kind: str) -> bytes:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        if (image.width, image.height, image.format) == (width_px, height_px, kind):
            return data
        return _encode(image.convert("RGB").resize((width_px, height_px)), kind)


def _encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return file.getvalue()


def _encoded(name: str, pixels: Sequence[NDArray[Any]], labels: Sequence[int] | None) -> Pictures:
    width_px = pixels[0].shape[1]
    kind = _kind(width_px)
    files = [_encode(Image.fromarray(image), kind) for image in pixels]
    return Pictures(_described(name, width_px), _type(kind), files, labels)
