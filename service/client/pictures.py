"""The types in which callers may pass an image, and their conversion to the bytes that are sent."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol


class Readable(Protocol):
    """A file opened in binary mode."""

    def read(self) -> bytes: ...


class Pixels(Protocol):
    """A Pillow image, or a NumPy array, uint8 [height, width, 3]."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


Image = bytes | bytearray | memoryview | str | os.PathLike[str] | Readable | Pixels
"""The bytes of an image file, its path, the file itself opened in binary mode, or pixels."""
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})  # that Pillow writes as PNG; not CMYK, for example


def contents(image: Image) -> bytes:
    """Return the bytes of an image file: as given, read from the file, or a PNG of the pixels.

    Raises:
        OSError: the file cannot be read.
        TypeError: not one of the types of `Image`.
        ValueError: an array of another dtype or shape, or an image without pixels.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if hasattr(image, "__array_interface__"):
        return _png(image)
    data = image.read() if hasattr(image, "read") else None
    if isinstance(data, bytes):
        return data
    raise TypeError(
        "an image is the bytes of its file, its path, a file opened as binary, an image of Pillow's or an array of "
        f"uint8 [height, width, 3], and not of type {type(image).__name__}"
    )


def name(image: Image, number: int) -> str:
    """The file name of an image in a batch: its file's own, or one made from its position, counted from 0."""
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "name", None)  # open files may have a name
    if not isinstance(path, str | os.PathLike):
        return f"image-{number + 1}"
    return Path(path).name.encode(errors="replace").decode()  # names in forms must be UTF-8; those of files need not be


def _png(pixels: Any) -> bytes:
    from PIL import Image as Pillow  # imported only when needed: slower to load than the client
    from PIL import ImageOps

    if not isinstance(pixels, Pillow.Image):
        kind, shape = getattr(pixels, "dtype", type(pixels).__name__), list(getattr(pixels, "shape", ()))
        if kind != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"an array of an image is uint8 [height, width, 3], and not {kind} {shape}")
        pixels = Pillow.fromarray(pixels)
    elif 0 in pixels.size:
        raise ValueError(f"the image has no pixels: it is of {pixels.width} by {pixels.height}")
    pixels = ImageOps.exif_transpose(pixels)  # as the server does for files; this PNG has no EXIF
    if pixels.mode not in PNG_MODES:
        pixels = pixels.convert("RGB")
    file = BytesIO()
    pixels.save(file, "PNG", compress_level=1)  # the fastest: on most networks, a smaller file saves less time
    return file.getvalue()
