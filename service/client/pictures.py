"""The forms in which a picture may be given, and the bytes that are sent of it."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol


class Readable(Protocol):
    """A file opened as binary."""

    def read(self) -> bytes: ...


class Pixels(Protocol):
    """An image of Pillow's, or a NumPy array of uint8 [height, width, 3]."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


Image = bytes | bytearray | memoryview | str | os.PathLike[str] | Readable | Pixels
"""The bytes of an image file, its path, the file itself, opened as binary, or pixels."""
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})  # of Pillow, as it writes them; not CMYK, for one


def contents(image: Image) -> bytes:
    """The bytes of an image file: those given, those read, or a PNG of the pixels.

    Raises:
        OSError: the file cannot be read.
        TypeError: it is none of what an image may be.
        ValueError: an array of another type or shape.
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
    """What an image is called in a batch: as its file, or by its number from 0."""
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "name", None)  # an open file may have one
    if not isinstance(path, str | os.PathLike):
        return f"image-{number + 1}"
    return Path(path).name.encode(errors="replace").decode()  # not every file's is UTF-8, as a form's has to be


def _png(pixels: Any) -> bytes:
    from PIL import Image as Pillow  # once they are needed: they take longer to load than the client
    from PIL import ImageOps

    if not isinstance(pixels, Pillow.Image):
        kind, shape = getattr(pixels, "dtype", type(pixels).__name__), list(getattr(pixels, "shape", ()))
        if kind != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"an array of an image is uint8 [height, width, 3], and not {kind} {shape}")
        pixels = Pillow.fromarray(pixels)
    elif 0 in pixels.size:
        raise ValueError(f"the image has no pixels: it is of {pixels.width} by {pixels.height}")
    pixels = ImageOps.exif_transpose(pixels)  # as the server turns a file, which PNG would not tell it
    if pixels.mode not in PNG_MODES:
        pixels = pixels.convert("RGB")
    file = BytesIO()
    pixels.save(file, "PNG", compress_level=1)  # the fastest: a smaller file gains less than it costs, on most ways
    return file.getvalue()
