"""Image files for tests."""

import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def in_more_passes(progressive: bytes, n_more: int) -> bytes:
    """A progressive JPEG whose last scan comes `n_more` times more, in a few bytes each where it is of one colour."""
    return progressive[:-2] + n_more * progressive[progressive.rindex(b"\xff\xda") : -2] + progressive[-2:]
