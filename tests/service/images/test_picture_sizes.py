"""An image's size and weight, read from its first bytes, in little time."""

import io
from time import thread_time

import numpy as np
import pytest
from PIL import Image

from service.images.decoder import ImageDecoder
from service.images.sizes import size_of, weight_of
from tests.service.pictures import encoded, in_more_passes

MOST_PIXELS = 32_000_000


def segment(kind: int, data: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + (2 + len(data)).to_bytes(2, "big") + data


def photo(height_px: int, width_px: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height_px // 4, width_px // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width_px, height_px))


SIZE = (70, 45)
PICTURE = Image.new("RGB", SIZE, "teal")
THUMBNAIL = b"Exif\0\0" + encoded(PICTURE.resize((7, 7)), "JPEG")


@pytest.mark.parametrize(
    "body",
    [
        encoded(PICTURE, "PNG"),
        encoded(PICTURE, "PNG", interlace=1),
        encoded(PICTURE, "GIF"),
        encoded(PICTURE, "BMP"),
        encoded(PICTURE, "BMP")[:22] + (-45).to_bytes(4, "little", signed=True) + encoded(PICTURE, "BMP")[26:],
        encoded(PICTURE, "WEBP"),
        encoded(PICTURE, "WEBP", lossless=True),
        encoded(PICTURE, "WEBP", exif=b"Exif\0\0note"),
        encoded(PICTURE, "JPEG"),
        encoded(PICTURE, "JPEG", progressive=True),
        encoded(PICTURE, "JPEG", exif=THUMBNAIL),
        encoded(PICTURE, "JPEG", icc_profile=bytes(500_000)),
    ],
)
def test_the_size_equals_that_of_the_opened_image(body: bytes) -> None:
    assert size_of(body) == Image.open(io.BytesIO(body)).size == SIZE


@pytest.mark.parametrize(
    "body", [b"", b"\x89PNG", b"GIF89a", b"BM", b"RIFF", b"\xff\xd8\xff", b"what is this", b"II*\0"]
)
def test_data_without_a_size_has_none(body: bytes) -> None:
    assert size_of(body) == (0, 0)
    assert weight_of(body, MOST_PIXELS) == len(body)


def test_weights_are_limited_for_headers_that_claim_too_much() -> None:
    body = encoded(PICTURE, "PNG")
    assert weight_of(body[:16] + b"\x7f\xff\xff\xff" * 2 + body[24:], MOST_PIXELS) == len(body) + MOST_PIXELS


@pytest.mark.parametrize("filling", [segment(0xFE, b""), b"\xff", segment(0xE1, bytes(60_000)), b"\0"])
def test_reading_the_size_is_fast_for_any_data_before_it(filling: bytes) -> None:
    body = encoded(PICTURE, "JPEG")
    body = body[:2] + 15_000_000 // len(filling) * filling + body[2:]
    started_s = thread_time()
    weight_of(body, MOST_PIXELS)
    assert thread_time() - started_s < 0.005


def test_decoding_time_is_about_proportional_to_weight() -> None:
    """Blank pages take two hundred times as long per byte as photographs."""
    decoder = ImageDecoder(32, 32, MOST_PIXELS)
    paces = []
    for body in (
        encoded(photo(1500, 2000), "JPEG", quality=85),
        encoded(photo(1500, 2000), "JPEG", quality=85, progressive=True),
        in_more_passes(encoded(Image.new("RGB", (2480, 3224), "white"), "JPEG", progressive=True), 80),
        encoded(photo(1500, 2000), "PNG", compress_level=1),
        encoded(Image.new("L", (2480, 3224), 255), "PNG"),
        encoded(Image.new("RGB", (2480, 3224), "white"), "PNG"),
        encoded(Image.new("RGB", (2480, 3224), "white"), "WEBP", lossless=True, quality=0, method=0),
    ):
        started_s = thread_time()
        decoder.decode_now(body)
        paces.append((thread_time() - started_s) / weight_of(body, MOST_PIXELS))
    decoder.close()
    assert max(paces) < 15 * min(paces)
