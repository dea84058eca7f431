"""Image files for tests."""

import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def in_more_passes(progressive: bytes, n_more: int) -> bytes:
    """Repeat the last scan of a progressive JPEG `n_more` times; each takes few bytes if the image has one colour."""
    return progressive[:-2] + n_more * progressive[progressive.rindex(b"\xff\xda") : -2] + progressive[-2:]
