"""Reads an image's size from its first bytes, and estimates the work of decoding it, in microseconds.

Formats: PNG specification, section 11.2.2; GIF89a, section 18; WebP container specification, "Extended File Format",
RFC 6386, section 9.1, and WebP lossless specification, section 3; BMP's BITMAPINFOHEADER.
"""

import struct

from service.images.jpeg_scans import BEGINNING as JPEG
from service.images.jpeg_scans import frame

# Decoding takes about as long per pixel as per byte. A large JPEG is decoded at a smaller size, so its pixels count for
# less, but every scan covers all of them.
PIXELS_A_BYTE_OF_JPEG = 16


def weight_of(body: bytes, most_pixels: int) -> int:
    """Estimate the work of decoding an image, in bytes of a photograph.

    Args:
        most_pixels: more do not count, as larger images are refused.
    """
    if body.startswith(JPEG):
        width_px, height_px, n_passes = frame(body)
        return len(body) + n_passes * (min(width_px * height_px, most_pixels) // PIXELS_A_BYTE_OF_JPEG)
    width_px, height_px = size_of(body)
    return len(body) + min(width_px * height_px, most_pixels)


def size_of(body: bytes) -> tuple[int, int]:
    """Width and height from the header; (0, 0) if they cannot be read."""
    if body.startswith(JPEG):
        return frame(body)[:2]
    if body.startswith(b"\x89PNG") and len(body) >= 24:
        width_px, height_px = struct.unpack_from(">II", body, 16)
    elif body.startswith(b"GIF8") and len(body) >= 10:
        width_px, height_px = struct.unpack_from("<HH", body, 6)
    elif body.startswith(b"BM") and len(body) >= 26:
        width_px, height_px = struct.unpack_from("<ii", body, 18)  # a negative height: rows are stored from the top
    else:
        return webp_canvas(body)
    return abs(width_px), abs(height_px)


def webp_canvas(body: bytes) -> tuple[int, int]:
    """Width and height from a WebP header; (0, 0) for any other file."""
    if body[:4] != b"RIFF" or body[8:12] != b"WEBP" or len(body) < 30:
        return 0, 0
    kind = body[12:16]
    if kind == b"VP8X":
        return int.from_bytes(body[24:27], "little") + 1, int.from_bytes(body[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(body[26:28], "little") & 0x3FFF, int.from_bytes(body[28:30], "little") & 0x3FFF
