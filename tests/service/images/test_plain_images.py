"""The fast path gives the same pixels as the general one, or none."""

import io
import struct
from zlib import compress, crc32, decompress

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from service.images.decoder import ImageDecoder
from service.images.plain import PlainJpeg, PlainPng
from tests.bundles import random_images

SIZE_PX = 32
PIXELS = random_images(1, seed=5)[0]
PLAIN = PlainPng(SIZE_PX, SIZE_PX)
PILLOW = ImageDecoder(SIZE_PX, SIZE_PX, max_pixels=10**6)


def written(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))


def filtered(kind: int) -> bytes:
    """A PNG whose rows all have the given filter (PNG specification, section 9), with its data in two chunks."""
    raw = np.concatenate([np.zeros((1, SIZE_PX, 3), int), PIXELS.astype(int)])
    raw = np.concatenate([np.zeros((SIZE_PX + 1, 1, 3), int), raw], axis=1)
    left, up, corner = raw[1:, :-1], raw[:-1, 1:], raw[:-1, :-1]
    guess = left + up - corner
    distances = np.stack([abs(guess - near) for near in (left, up, corner)])
    paeth = np.choose(distances.argmin(axis=0), [left, up, corner])
    predicted = [0 * left, left, up, (left + up) // 2, paeth][kind]
    rows = ((raw[1:, 1:] - predicted) % 256).astype(np.uint8).reshape(SIZE_PX, -1)
    data = compress(b"".join(bytes([kind]) + row.tobytes() for row in rows))
    header = written(PIXELS)[:33]
    return header + chunk(b"IDAT", data[:500]) + chunk(b"IDAT", data[500:]) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "body",
    [written(PIXELS), written(PIXELS, optimize=True), written(PIXELS, compress_level=0), *map(filtered, range(5))],
)
def test_plain_files_are_decoded(body: bytes) -> None:
    pixels = PLAIN.decode(body)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, PIXELS)
    assert pixels.dtype == np.uint8


def test_plain_files_need_not_be_square() -> None:
    pixels = random_images(1, seed=6)[0][:20]
    np.testing.assert_array_equal(PlainPng(20, SIZE_PX).decode(written(pixels)), pixels)


def info() -> PngImagePlugin.PngInfo:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "hello")
    return notes


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x89PNG",
        written(PIXELS[:, :, 0]),
        written(np.dstack([PIXELS, PIXELS[:, :, :1]])),
        written(PIXELS[:20]),
        written(PIXELS, pnginfo=info()),
        written(PIXELS, transparency=(1, 2, 3)),
        written(PIXELS)[:-12],
        written(PIXELS)[:-30],
        written(PIXELS)[:33],
        written(PIXELS)[:33] + chunk(b"IEND", b""),
        written(PIXELS)[:33] + chunk(b"IDAT", b"not deflated at all") + chunk(b"IEND", b""),
        written(PIXELS)[:33] + chunk(b"IDAT", compress(b"\0" * 40)[:-6]) + chunk(b"IEND", b""),
        written(PIXELS).replace(b"IDAT", b"IDAt"),
        written(PIXELS)[:60] + b"!" + written(PIXELS)[61:],
    ],
)
def test_all_other_files_are_left_to_the_general_path(body: bytes) -> None:
    assert PLAIN.decode(body) is None


def test_both_paths_agree_on_modified_files() -> None:
    """One byte at a time: if the fast path gives pixels, the general one gives the same."""
    body = written(PIXELS)
    rng = np.random.default_rng(0)
    for at in range(len(body)):
        changed = bytearray(body)
        changed[at] ^= int(rng.integers(1, 256))
        if (pixels := PLAIN.decode(bytes(changed))) is not None:
            np.testing.assert_array_equal(pixels, PILLOW.load(PILLOW.open(bytes(changed))))
    assert len(decompress(body[41:-16])) == SIZE_PX * (1 + 3 * SIZE_PX)  # the chunk that most of these bytes are in


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


JPEG = PlainJpeg(SIZE_PX, SIZE_PX)
PLAIN_JPEGS = [
    jpeg(PIXELS, quality=quality, subsampling=subsampling, progressive=progressive)
    for quality in (30, 75, 100)
    for subsampling in (0, 1, 2)
    for progressive in (False, True)
] + [jpeg(PIXELS, "L")]


@pytest.mark.parametrize("body", PLAIN_JPEGS)
def test_plain_jpegs_give_pillows_pixels(body: bytes) -> None:
    pixels = JPEG.decode(body)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, PILLOW.load(PILLOW.open(body)))
    assert (pixels.shape, pixels.dtype) == (PIXELS.shape, np.uint8)


def exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xd8\xff",
        jpeg(PIXELS[:20]),
        jpeg(PIXELS, "CMYK"),
        jpeg(PIXELS, exif=exif(6)),
        jpeg(PIXELS, xmp=b"<x:xmpmeta/>"),
        jpeg(PIXELS)[:-2],
        jpeg(PIXELS)[:-50],
        jpeg(PIXELS)[:100],
        written(PIXELS),
    ],
)
def test_all_other_jpegs_are_left_to_the_general_path(body: bytes) -> None:
    assert JPEG.decode(body) is None


def test_both_paths_agree_on_modified_jpegs() -> None:
    body = jpeg(PIXELS, quality=60)
    rng = np.random.default_rng(0)
    n_decoded = 0
    for at in range(len(body)):
        changed = bytearray(body)
        changed[at] ^= int(rng.integers(1, 256))
        if (pixels := JPEG.decode(bytes(changed))) is not None:
            n_decoded += 1
            np.testing.assert_array_equal(pixels, PILLOW.load(PILLOW.open(bytes(changed))))
    assert n_decoded > 10
