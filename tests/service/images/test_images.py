"""Decoding image files to the network's pixels, and refusing all others."""

import asyncio
import io
import struct
import zlib
from collections.abc import Callable
from time import thread_time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.images.decoder import SMALL_PIXELS, ImageDecoder, ImageError
from tests.service.pictures import encoded, in_more_passes

SIZE_PX = 32
REFUSED_WITHIN_S = 0.1  # CPU time; decoding would take ten times as long
DECODER = ImageDecoder(SIZE_PX, SIZE_PX, max_pixels=32_000_000)


def noise(height_px: int = SIZE_PX, width_px: int = SIZE_PX, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def photo(height_px: int, width_px: int) -> NDArray[np.uint8]:
    """A smooth image, for comparing ways of scaling: red increases to the right, green downwards."""
    y, x = np.mgrid[0:height_px, 0:width_px]
    blue = 128 + 80 * np.sin(6 * x / width_px) * np.cos(6 * y / height_px)
    return np.stack([255 * x / (width_px - 1), 255 * y / (height_px - 1), blue], -1).astype(np.uint8)


def many_scans(side_px: int, n_more: int) -> bytes:
    """A progressive JPEG whose last scan is repeated `n_more` times, in a few bytes each."""
    return in_more_passes(encoded(Image.new("RGB", (side_px, side_px), "teal"), "JPEG", progressive=True), n_more)


def kind_of_error(body: bytes, decoder: ImageDecoder = DECODER) -> str:
    with pytest.raises(ImageError) as caught:
        decoder.decode_now(body)
    assert str(caught.value).endswith((".", ")"))
    return caught.value.kind


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PNG", {"interlace": 1})]
)
def test_lossless_files_of_the_networks_size_are_decoded_exactly(file_format: str, options: Any) -> None:
    pixels = noise()
    decoded = DECODER.decode_now(encoded(Image.fromarray(pixels), file_format, **options))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("file_format", ["JPEG", "GIF", "WEBP"])
def test_lossy_files_are_decoded_approximately(file_format: str) -> None:
    pixels = photo(SIZE_PX, SIZE_PX)
    decoded = DECODER.decode_now(encoded(Image.fromarray(pixels), file_format))
    assert decoded.shape == (SIZE_PX, SIZE_PX, 3)
    assert np.abs(decoded.astype(int) - pixels).mean() < 8


@pytest.mark.parametrize(("height_px", "width_px"), [(1, 1), (7, 300), (300, 7), (224, 224), (33, 32), (480, 640)])
@pytest.mark.parametrize("network", [(32, 32), (24, 48)])
def test_any_size_is_scaled_to_the_networks(height_px: int, width_px: int, network: tuple[int, int]) -> None:
    body = encoded(Image.fromarray(noise(height_px, width_px)), "PNG")
    assert ImageDecoder(*network, max_pixels=10**6).decode_now(body).shape == (*network, 3)


def test_the_crop_never_exceeds_the_image() -> None:
    # Careless rounding when scaling these to 224 x 224 gives boxes that Pillow refuses.
    sides = np.random.default_rng(0).integers(1, 400, (1000, 2)).tolist()
    decoder = ImageDecoder(224, 224, max_pixels=10**6)
    for width_px, height_px in [(30, 29), (29, 30), *sides]:
        image = Image.new("L", (width_px, height_px), 77)
        assert (decoder.decode_now(encoded(image, "BMP")) == 77).all(), (width_px, height_px)


def test_a_wide_image_is_cropped_around_its_centre() -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = (10, 200, 30)
    decoded = DECODER.decode_now(encoded(Image.fromarray(pixels), "PNG"))
    inside = decoded[:, 1:-1]  # the outermost columns see their neighbours, as when scaling before cutting
    np.testing.assert_array_equal(inside, np.broadcast_to(np.array((10, 200, 30)), inside.shape))
    assert decoded[:, [0, -1], 1].min() > 150


def test_scaling_is_antialiased() -> None:
    checkers = np.indices((256, 256)).sum(0) % 2 * 255
    decoded = DECODER.decode_now(encoded(Image.fromarray(np.uint8(checkers)), "PNG"))
    assert np.abs(decoded.astype(int) - 127).max() <= 3  # nearest-neighbour sampling would give 0 or 255


def test_a_large_jpeg_decoded_small_equals_one_decoded_whole() -> None:
    pixels = Image.fromarray(photo(1200, 1600))
    small = DECODER.decode_now(encoded(pixels, "JPEG", quality=95))
    whole = DECODER.decode_now(encoded(pixels, "PNG"))
    assert np.abs(small.astype(int) - whole).max() <= 4


def test_a_jpeg_is_not_decoded_so_small_that_edges_suffer() -> None:
    y, x = np.mgrid[0:520, 0:650]
    tiles = np.where(((x // 25 + y // 25) % 2)[..., None], photo(520, 650), 255 - photo(520, 650))
    body = encoded(Image.fromarray(tiles), "JPEG", quality=95)
    whole = DECODER.decode_now(encoded(Image.open(io.BytesIO(body)), "PNG"))
    assert np.abs(DECODER.decode_now(body).astype(int) - whole).max() <= 20  # at an eighth: 45


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("network", [(32, 32), (20, 40)])
def test_exif_orientation_is_followed(orientation: int, file_format: str, network: tuple[int, int]) -> None:
    """The stored pixels are the upright image turned the opposite way, so that applying the orientation restores it."""
    undo: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    upright = photo(60, 120)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](upright))
    body = encoded(Image.fromarray(stored), file_format, exif=exif, **({} if file_format == "PNG" else {"quality": 95}))
    decoder = ImageDecoder(*network, max_pixels=10**6)
    expected = decoder.decode_now(encoded(Image.fromarray(upright), "PNG"))
    assert np.abs(decoder.decode_now(body).astype(int) - expected).mean() < 4


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"]
)
def test_damaged_exif_data_is_ignored(exif: bytes) -> None:
    pixels = photo(SIZE_PX, SIZE_PX)
    decoded = DECODER.decode_now(encoded(Image.fromarray(pixels), "PNG", exif=exif))
    np.testing.assert_array_equal(decoded, pixels)


def test_grey_palette_and_cmyk_become_rgb() -> None:
    grey = photo(SIZE_PX, SIZE_PX)[..., 2]
    expected = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(DECODER.decode_now(encoded(Image.fromarray(grey), "PNG")), expected)
    palette = Image.fromarray(expected).quantize(256)
    np.testing.assert_array_equal(DECODER.decode_now(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    cmyk = encoded(Image.fromarray(expected).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(DECODER.decode_now(cmyk).astype(int) - expected).mean() < 4
    bilevel = encoded(Image.fromarray(grey > 128), "PNG")
    np.testing.assert_array_equal(DECODER.decode_now(bilevel)[..., 0], np.where(grey > 128, 255, 0))


@pytest.mark.parametrize("side_px", [SIZE_PX, 100])
def test_sixteen_bit_grey_is_scaled_not_clipped(side_px: int) -> None:
    deep = np.linspace(0, 65535, side_px * side_px).reshape(side_px, side_px).astype(np.uint16)
    shallow = (deep / 257).round().astype(np.uint8)
    decoded = DECODER.decode_now(encoded(Image.fromarray(deep), "PNG"))
    expected = DECODER.decode_now(encoded(Image.fromarray(shallow), "PNG"))
    assert np.abs(decoded.astype(int) - expected).max() <= (0 if side_px == SIZE_PX else 1)


def png_of_16_bits(colour_type: int, samples: NDArray[np.uint16], transparent: bytes | None = None) -> bytes:
    """A PNG of samples [height, width, channels], 16 bits each; Pillow reads these but writes grey ones alone."""
    height_px, width_px, _ = samples.shape
    header = struct.pack(">IIBBBBB", width_px, height_px, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    key = b"" if transparent is None else chunk(b"tRNS", transparent)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side_px", [SIZE_PX, 100])
@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_images_of_every_kind_equal_their_eight_bit_versions(
    side_px: int, colour_type: int, channels: int
) -> None:
    deep = np.linspace(0, 65535, side_px * side_px).reshape(side_px, side_px, 1).astype(np.uint16)
    samples = np.repeat(deep, channels, axis=2)
    if channels in (2, 4):
        samples[..., -1] = 65535  # opaque
    expected = DECODER.decode_now(encoded(Image.fromarray((deep[..., 0] / 257).round().astype(np.uint8)), "PNG"))
    decoded = DECODER.decode_now(png_of_16_bits(colour_type, samples))
    assert np.abs(decoded.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("side_px", [SIZE_PX, 90])
def test_one_of_65536_greys_may_be_transparent(side_px: int) -> None:
    samples = np.full((side_px, side_px, 1), 512, np.uint16)
    samples[: side_px // 2] = 0x1234
    decoded = DECODER.decode_now(png_of_16_bits(0, samples, transparent=struct.pack(">H", 0x1234)))
    assert decoded[: SIZE_PX // 2 - 1].min() == 255
    assert decoded[SIZE_PX // 2 + 1 :].max() == 2


@pytest.mark.parametrize("side_px", [SIZE_PX, 90])
def test_half_transparent_black_is_grey_and_its_colour_does_not_bleed(side_px: int) -> None:
    image = Image.new("RGBA", (side_px, side_px), (0, 0, 0, 128))
    assert np.abs(DECODER.decode_now(encoded(image, "PNG")).astype(int) - 127).max() <= 1
    image = Image.new("RGBA", (side_px, side_px), (255, 0, 0, 0))  # red, but fully transparent
    image.paste((255, 255, 255, 255), (0, 0, side_px // 2, side_px))
    assert DECODER.decode_now(encoded(image, "WEBP", lossless=True, exact=True)).min() == 255


@pytest.mark.parametrize("side_px", [SIZE_PX, 90])
def test_a_palette_may_have_an_alpha_for_every_entry(side_px: int) -> None:
    indexed = Image.fromarray(np.repeat(np.arange(side_px, dtype=np.uint8)[None] * 3 // side_px, side_px, 0), "L")
    indexed = indexed.convert("P")
    indexed.putpalette([0, 0, 0, 0, 0, 0, 0, 0, 0])
    decoded = DECODER.decode_now(encoded(indexed, "PNG", transparency=bytes([255, 128, 0])))
    assert [int(decoded[16, column, 0]) for column in (3, 16, 29)] == pytest.approx([0, 127, 255], abs=1)


def test_inverted_cmyk_is_decoded() -> None:
    """Adobe's programs store CMYK inverted, which a marker of theirs indicates; Pillow writes that marker."""
    body = encoded(Image.new("CMYK", (SIZE_PX, SIZE_PX), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in body[:40]
    assert np.abs(DECODER.decode_now(body).astype(int) - (255, 0, 0)).max() <= 3  # magenta and yellow make red


def test_a_single_frame_is_accepted_in_formats_for_animations() -> None:
    frame = Image.fromarray(photo(SIZE_PX, SIZE_PX))
    for file_format in ("GIF", "WEBP", "PNG"):
        assert DECODER.decode_now(encoded(frame, file_format, save_all=True)).shape == (SIZE_PX, SIZE_PX, 3)


@pytest.mark.parametrize("side_px", [SIZE_PX, 90])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_parts_become_white(mode: str, side_px: int) -> None:
    half = side_px // 2
    image = Image.new("RGBA", (side_px, side_px), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, half, side_px))
    if mode == "L":
        grey = np.full((side_px, side_px), 7, np.uint8)
        grey[:, :half] = 0
        body = encoded(Image.fromarray(grey), "PNG", transparency=7)
    elif mode == "P":
        indexed = Image.fromarray(np.array([np.arange(side_px) >= half] * side_px, np.uint8), "L").convert("P")
        indexed.putpalette([0, 0, 0, 9, 9, 9])
        body = encoded(indexed, "PNG", transparency=1)
    else:
        body = encoded(image.convert(mode), "PNG")
    decoded = DECODER.decode_now(body)
    assert decoded[:, : SIZE_PX // 2 - 1].max() == 0
    assert decoded[:, SIZE_PX // 2 + 1 :].min() == 255


@pytest.mark.parametrize("side_px", [SIZE_PX, 96])
@pytest.mark.parametrize(
    ("bits", "colour_type", "value"),
    [(1, 0, 1), (2, 0, 1), (4, 0, 5), (8, 0, 7), (16, 0, 0x1234), (8, 2, 0x07), (16, 2, 0x1234)],
)
def test_a_transparent_colour_becomes_white_at_any_depth(bits: int, colour_type: int, value: int, side_px: int) -> None:
    """For pixels of more or fewer than 8 bits, Pillow gives the transparent colour as stored in the file."""
    n_channels = 3 if colour_type == 2 else 1
    samples = np.zeros((side_px, side_px, n_channels), np.uint16)
    samples[:, side_px // 2 :] = value
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    elif bits == 8:
        rows = [row.astype(np.uint8).tobytes() for row in samples]
    else:
        as_bits = samples >> np.arange(bits - 1, -1, -1, dtype=np.uint16) & 1
        rows = [np.packbits(row.astype(np.uint8)).tobytes() for row in as_bits]
    header = struct.pack(">IIBBBBB", side_px, side_px, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    named = chunk(b"tRNS", struct.pack(">H", value) * n_channels)
    parts = [chunk(b"IHDR", header), named, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    decoded = DECODER.decode_now(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert decoded[:, : SIZE_PX // 2 - 1].max() == 0
    assert decoded[:, SIZE_PX // 2 + 1 :].min() == 255


def test_files_that_are_no_images_are_refused() -> None:
    assert kind_of_error(b"") == "empty-image"
    assert kind_of_error(b"just a text in a file named cat.png") == "not-an-image"
    assert kind_of_error(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "not-an-image"
    assert kind_of_error(encoded(Image.fromarray(noise()), "TIFF")) == "not-an-image"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_image_is_refused(file_format: str, kept: float) -> None:
    body = encoded(Image.fromarray(noise(100, 100)), file_format)
    assert kind_of_error(body[: int(len(body) * kept)]) == "broken-image"
    assert kind_of_error(body[:20]) == "broken-image"


def test_a_damaged_png_is_refused() -> None:
    body = bytearray(encoded(Image.fromarray(noise()), "PNG"))
    body[len(body) // 2] ^= 0xFF
    assert kind_of_error(bytes(body)) == "broken-image"


def png_of_rows(n_rows: int, n_named: int, width_px: int, n_idats: int, levels: int = 255) -> bytes:
    """A PNG with valid data of `n_rows` rows, whose header claims `n_named`."""
    rows = noise(n_rows, width_px).reshape(n_rows, -1) % levels
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [data[i * len(data) // n_idats : (i + 1) * len(data) // n_idats] for i in range(n_idats)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width_px, n_named, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(b"IDAT", part) for part in parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side_px", [SIZE_PX, 33, 300])
@pytest.mark.parametrize("n_idats", [1, 3, 20])  # the last of no more than a few bytes
@pytest.mark.parametrize("levels", [1, 2, 255])
def test_a_png_cut_short_after_a_row_is_refused(side_px: int, n_idats: int, levels: int) -> None:
    for n_rows in (1, side_px * 5 // 8, side_px - 1):
        assert kind_of_error(png_of_rows(n_rows, side_px, side_px, n_idats, levels)) == "broken-image"
    whole = DECODER.decode_now(png_of_rows(side_px, side_px, side_px, n_idats, levels))
    pixels = Image.fromarray(noise(side_px, side_px) % levels)
    np.testing.assert_array_equal(whole, DECODER.decode_now(encoded(pixels, "BMP")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("interlace", [0, 1])
def test_complete_pngs_are_accepted_at_any_compression(mode: str, interlace: int) -> None:
    """How much output remains when all input is read depends on width, height and content."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        height_px, width_px = rng.integers(1, 300, 2).tolist()
        image = Image.fromarray(noise(height_px, width_px) % int(rng.choice([1, 2, 200]))).convert(mode)
        body = encoded(image, "PNG", interlace=interlace, compress_level=int(rng.integers(1, 10)))
        opened = DECODER.open(body)
        opened.load()
        assert opened.tobytes() == image.tobytes()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_animated_images_are_refused(file_format: str) -> None:
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    body = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert kind_of_error(body) == "animated-image"


def test_of_a_jpeg_with_a_second_image_the_first_is_decoded() -> None:
    pixels = Image.fromarray(photo(64, 64))
    body = encoded(pixels, "MPO", save_all=True, append_images=[Image.fromarray(noise(64, 64))])
    alone = DECODER.decode_now(encoded(pixels, "JPEG"))
    assert np.abs(DECODER.decode_now(body).astype(int) - alone).max() <= 2


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side_px: int) -> bytes:
    """A black one-bit image: 100 megapixels in 12 kB."""
    rows = zlib.compress(bytes((side_px // 8 + 1) * side_px), 9)
    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp_bomb(side_px: int) -> bytes:
    """The header of a lossless WebP whose canvas would take gigabytes."""
    bits = (side_px - 1) | (side_px - 1) << 14
    data = b"\x2f" + bits.to_bytes(4, "little") + bytes(16)
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize("side_px", [5_800, 9_472, 10_000, 40_000])
def test_a_bomb_is_refused_from_its_header(side_px: int) -> None:
    body = png_bomb(side_px) if side_px <= 10_000 else png_bomb(8)[:16] + struct.pack(">II", side_px, side_px)
    body = body if side_px <= 10_000 else body + png_bomb(8)[24:]
    if side_px > 10_000:  # the checksum of the patched header
        body = body[:29] + struct.pack(">I", zlib.crc32(body[12:29])) + body[33:]
    started_s = thread_time()
    assert kind_of_error(body) == "image-too-large"
    assert thread_time() - started_s < REFUSED_WITHIN_S


def test_a_webp_bomb_is_refused_before_its_canvas_exists() -> None:
    for body in (
        webp_bomb(16_383),
        b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2 + bytes(8),
        b"RIFF\x1e\0\0\0WEBPVP8 \x0a\0\0\0\0\0\0\x9d\x01\x2a" + b"\xff\x3f" * 2 + bytes(8),
    ):
        started_s = thread_time()
        assert kind_of_error(body) == "image-too-large"
        assert thread_time() - started_s < REFUSED_WITHIN_S


def test_gif_canvas_outside_the_frame_is_white() -> None:
    frame = Image.fromarray(noise(10, 10)).quantize(4)
    body = encoded(frame, "GIF")
    at = body.index(b",\0\0\0\0")
    moved = struct.pack("<HH", 4, 2)  # on a larger screen
    placed = body[:6] + struct.pack("<HH", 16, 16) + body[10 : at + 1] + moved + body[at + 5 :]
    expected = np.full((16, 16, 3), 255, np.uint8)
    expected[2:12, 4:14] = np.asarray(frame.convert("RGB"))
    np.testing.assert_array_equal(ImageDecoder(16, 16, max_pixels=1000).decode_now(placed), expected)


@pytest.mark.parametrize("disposal", [2, 3])
def test_a_gif_is_opened_without_preparing_its_frames_disposal(disposal: int) -> None:
    """Pillow fills an area of the frame's claimed size for it, before that size can be checked."""
    frame = Image.fromarray(noise(40, 50)).quantize(4)
    small = encoded(frame, "GIF", disposal=disposal, transparency=3)
    np.testing.assert_array_equal(DECODER.decode_now(small), DECODER.decode_now(encoded(frame, "GIF", transparency=3)))
    assert DECODER.open(small).dispose is None  # type: ignore[attr-defined]
    at = small.index(b",\0\0\0\0") + 5  # its frame's width and height; the screen's stay as they are
    large = small[:at] + struct.pack("<HH", 13_300, 13_300) + small[at + 4 :]
    started_s = thread_time()
    assert kind_of_error(large) == "image-too-large"
    assert thread_time() - started_s < REFUSED_WITHIN_S / 2


def test_the_pixel_limit_is_inclusive() -> None:
    body = encoded(Image.fromarray(noise(40, 50)), "PNG")
    assert ImageDecoder(SIZE_PX, SIZE_PX, max_pixels=2000).decode_now(body).shape == (SIZE_PX, SIZE_PX, 3)
    with pytest.raises(ImageError, match=r"50 x 40 = 2,000 pixels and this server accepts at most 1,999:") as caught:
        ImageDecoder(SIZE_PX, SIZE_PX, max_pixels=1999).decode_now(body)
    assert caught.value.kind == "image-too-large"


@pytest.mark.parametrize("side_px", [SIZE_PX, int(SMALL_PIXELS**0.5) + 8, 400])
def test_decoding_on_the_event_loop_gives_the_same_pixels(side_px: int) -> None:
    times: list[float] = []
    decoder = ImageDecoder(SIZE_PX, SIZE_PX, max_pixels=10**6, observe_seconds=times.append)
    body = encoded(Image.fromarray(noise(side_px, side_px)), "PNG")
    np.testing.assert_array_equal(asyncio.run(decoder.decode(body)), decoder.decode_now(body))
    assert len(times) == 1
    assert times[0] > 0


SEEDS = [
    encoded(Image.fromarray(photo(24, 24)), file_format) for file_format in ("PNG", "JPEG", "WEBP", "BMP", "GIF")
] + [webp_bomb(40), png_bomb(40)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
def test_damaged_files_are_decoded_or_refused_and_nothing_else(
    body: bytes, changes: list[tuple[float, int]], kept: float
) -> None:
    damaged = bytearray(body)
    for where, value in changes:
        damaged[int(where * len(damaged))] = value
    damaged = damaged[: max(1, int(len(damaged) * kept))] if kept < 0.8 else damaged
    try:
        decoded = DECODER.decode_now(bytes(damaged))
    except ImageError:
        return
    assert decoded.shape == (SIZE_PX, SIZE_PX, 3)
    assert decoded.dtype == np.uint8


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a"]))
def test_random_bytes_are_refused(data: bytes, magic: bytes) -> None:
    with pytest.raises(ImageError):
        DECODER.decode_now(magic + data)


@pytest.mark.parametrize("side_px", [SIZE_PX, 200, 3000])
def test_a_jpeg_with_too_many_passes_is_refused_before_decoding(side_px: int) -> None:
    body = many_scans(side_px, 5_000)
    started_s = thread_time()
    assert kind_of_error(body) == "broken-image"
    assert thread_time() - started_s < REFUSED_WITHIN_S
    assert kind_of_error(body[:2] + b"\xff\x01" + body[2:]) == "broken-image"  # a marker without a length before it
    assert kind_of_error(body, ImageDecoder(side_px, side_px, max_pixels=10**7)) == "broken-image"


def test_data_after_a_jpeg_does_not_count_as_passes() -> None:
    """A video after a photograph, or metadata in it, may contain the bytes of that marker as well."""
    noise = 500 * b"\xff\xda\0\x08"
    note = b"\xff\xec" + (2 + len(noise)).to_bytes(2, "big") + noise
    for body in (many_scans(SIZE_PX, 0), many_scans(SIZE_PX, 80), encoded(Image.new("L", (50, 50)), "JPEG")):
        whole = DECODER.decode_now(body)
        np.testing.assert_array_equal(DECODER.decode_now(body + noise), whole)
        np.testing.assert_array_equal(DECODER.decode_now(body[:2] + note + body[2:]), whole)


@pytest.mark.parametrize(
    "filling", [b"\xff", b"\xff\xfe\0\2", b"\xff\xe1\0\x09Exif\0\0A"], ids=["filling", "comments", "notes"]
)
def test_a_jpeg_with_too_many_segments_is_refused_before_opening(filling: bytes) -> None:
    body = encoded(Image.new("RGB", (50, 50)), "JPEG")
    for place in (body[:2], body[: body.index(b"\xff\xda")]):
        started_s = thread_time()
        assert kind_of_error(place + 4_000_000 // len(filling) * filling + body[len(place) :]) == "broken-image"
        assert thread_time() - started_s < REFUSED_WITHIN_S


def with_notes(file_format: str, n_notes: int) -> bytes:
    """An image with many metadata entries, the last being its orientation; as compressed text in "zTXt"."""
    entries = [struct.pack("<HHLL", tag, 7, 1, 0) for tag in range(1, n_notes)]
    entries.append(struct.pack("<HHLHH", 0x0112, 3, 1, 3, 0))
    notes = b"Exif\0\0II*\0" + struct.pack("<LH", 8, n_notes) + b"".join(entries) + bytes(4)
    picture = Image.fromarray(photo(SIZE_PX, SIZE_PX))
    if file_format != "zTXt":
        return encoded(picture, file_format, exif=notes, **({"lossless": True} if file_format == "WEBP" else {}))
    text = f"\nexif\n{len(notes):8}\n{notes.hex()}\n".encode()
    body = encoded(picture, "PNG")
    return body[:33] + chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)) + body[33:]


@pytest.mark.parametrize("file_format", ["PNG", "zTXt", "WEBP", "JPEG"])
def test_excessive_metadata_is_not_read(file_format: str) -> None:
    """For 40,000, which compress to 3 KB, Pillow took half a second on the event loop."""
    few, many = (with_notes(file_format, n_notes) for n_notes in (150, 5_000))
    upright = np.asarray(Image.fromarray(photo(SIZE_PX, SIZE_PX))).astype(int)
    assert np.abs(DECODER.decode_now(few) - upright[::-1, ::-1]).max() < 20
    opened = DECODER.open(many)
    assert np.abs(DECODER.load(opened) - upright).max() < 20
    assert opened._exif is None


PACKED = b"note\0\0" + zlib.compress(bytes(1_000_000), 9)


@pytest.mark.parametrize(
    ("piece", "n_pieces"), [(chunk(b"iCCP", PACKED), 500), (chunk(b"abCd", b""), 300_000)], ids=["profiles", "chunks"]
)
def test_a_png_with_too_many_chunks_is_refused_before_opening(piece: bytes, n_pieces: int) -> None:
    body = encoded(Image.fromarray(noise(40, 40)), "PNG")
    for at in (33, len(body) - 12):  # before its pixels, and after
        started_s = thread_time()
        assert kind_of_error(body[:at] + n_pieces * piece + body[at:]) == "broken-image"
        assert thread_time() - started_s < REFUSED_WITHIN_S


def test_a_small_png_with_much_data_is_not_decoded_on_the_event_loop() -> None:
    body = encoded(Image.fromarray(noise(40, 40)), "PNG")
    few, many = (body[:33] + n * chunk(b"zTXt", PACKED) + body[33:] for n in (1, 50))
    pixels = DECODER.decode_here(few)
    assert pixels is not None
    started_s = thread_time()
    assert DECODER.decode_here(many) is None
    assert thread_time() - started_s < 0.005
    np.testing.assert_array_equal(DECODER.decode_now(many), pixels)


def test_images_with_usual_metadata_are_decoded() -> None:
    """Colour profiles of 500 kB, EXIF, and one chunk per row."""
    pixels = photo(200, 200)
    added = {"icc_profile": np.random.default_rng(0).bytes(500_000), "exif": Image.Exif().tobytes()}
    for file_format in ("JPEG", "PNG", "WEBP"):
        decoded = DECODER.decode_now(encoded(Image.fromarray(pixels), file_format, **added, quality=95))
        plain = DECODER.decode_now(encoded(Image.fromarray(pixels), "PNG"))
        assert np.abs(decoded.astype(int) - plain).max() <= 8
    assert DECODER.decode_now(png_of_rows(3000, 3000, 30, 3000)).shape == (SIZE_PX, SIZE_PX, 3)
