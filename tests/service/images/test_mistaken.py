"""Refusals name what was sent instead of an image."""

import base64
import gzip
import io
import zipfile

import httpx
import pytest
from PIL import Image

from service.images.decoder import ImageDecoder, ImageError
from service.images.mistaken import name_of


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(file, kind)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", encoded("PNG"))
    return file.getvalue()


SENT = {
    "HEIC": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200),
    "AVIF": encoded("AVIF"),
    "MP4": b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + bytes(200),
    "PDF": encoded("PDF"),
    "TIFF": encoded("TIFF"),
    "JPEG 2000": encoded("JPEG2000"),
    "ICO": encoded("ICO"),
    "ZIP": zipped(),
    "gzip": gzip.compress(encoded("PNG")),
    "base64": base64.b64encode(encoded("PNG")),
    "data: URL": b"data:image/png;base64," + base64.b64encode(encoded("PNG")),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "SVG": b'\xef\xbb\xbf\n <svg xmlns="http://www.w3.org/2000/svg"/>',
    "web page": b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
    "JSON": b'{"image": "..."}',
    "form": httpx.Request("POST", "http://x", files={"image": encoded("PNG")}).read(),
}


@pytest.mark.parametrize("name", SENT)
def test_what_was_sent_is_named(name: str) -> None:
    with pytest.raises(ImageError, match=name) as refused:
        ImageDecoder(32, 32, max_pixels=10_000).decode_now(SENT[name])
    assert refused.value.kind == "not-an-image"
    assert "PNG, JPEG, WebP, BMP or GIF" in str(refused.value)
    assert "b'" not in str(refused.value)


def test_base64_of_a_jpeg_is_recognised() -> None:
    assert "base64" in (name_of(base64.b64encode(encoded("JPEG"))) or "")


@pytest.mark.parametrize("body", [b"just a text", b"\x01\x02\x03", b"", b"\x00\x00\x00\x18ft"])
def test_unknown_data_is_not_named(body: bytes) -> None:
    assert name_of(body) is None
