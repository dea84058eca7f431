"""A fast path for the images that most clients send, plain ones of the network's own size, to the same pixels.

Half of a small PNG's cost in Pillow is Python code around its decoder: finding the plugin, reading ahead, keeping
metadata. This path supports a single format and calls Pillow's decoder directly. A JPEG photograph of 224 pixels takes
two thirds of Pillow's time in simplejpeg, the same libjpeg-turbo without copies between layouts. All other files, also
unusual or damaged ones, are left to `decoder`, which also reports errors.
"""

import struct
from zlib import crc32

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from service.images.jpeg_scans import BEGINNING as JPEG
from service.images.jpeg_scans import is_endless

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RGB_OF_8_BITS = struct.pack(">5B", 8, 2, 0, 0, 0)  # bits, colour type, compression, filter, no interlacing
CHUNK_FRAME_BYTES = 12  # length and kind before its data, a checksum after
DONE = (-1, 0)  # result of Pillow's decoders: no more bytes needed, no error
# JPEGs of other colour spaces, or with metadata that may contain an orientation, are left to Pillow.
PLAIN_COLOURS = frozenset({"YCbCr", "Gray"})
SAYS_MORE = (b"Exif", b"http://ns.adobe.com/xap/")


class PlainPng:
    """Decodes PNG files of one size that hold 8-bit RGB and nothing else.

    Args:
        height_px, width_px: the size.
    """

    def __init__(self, height_px: int, width_px: int) -> None:
        self._size = (width_px, height_px)
        self._shape = (height_px, width_px, 3)
        header = b"IHDR" + struct.pack(">II", width_px, height_px) + RGB_OF_8_BITS
        self._beginning = SIGNATURE + struct.pack(">I", len(header) - 4) + header + struct.pack(">I", crc32(header))

    def decode(self, body: bytes) -> NDArray[np.uint8] | None:
        """Return the pixels, uint8 [height_px, width_px, 3]; None for any other file."""
        if not body.startswith(self._beginning):
            return None
        data = _image_data(body, len(self._beginning))
        return None if data is None else self._unpack(data)

    def _unpack(self, data: bytes) -> NDArray[np.uint8] | None:
        box = (0, 0, *self._size)
        try:  # Pillow's internals, as `load` and `tobytes` use them; should they change, `decoder` takes over
            core = Image.core  # type: ignore[attr-defined]
            image = core.new("RGB", self._size)
            decoder = core.zip_decoder("RGB", "RGB", 0)
            decoder.setimage(image, box)
            # Given the last byte, one of a checksum, it would also report DONE after too few rows.
            if decoder.decode(data[:-1]) != DONE:
                return None
            encoder = core.raw_encoder("RGB", "RGB", 0, 1)
            encoder.setimage(image, box)
            pixels = encoder.encode(3 * self._size[0] * self._size[1])[2]
            return np.frombuffer(pixels, np.uint8).reshape(self._shape)
        except (AttributeError, TypeError, ValueError, OSError):
            return None


class PlainJpeg:
    """Decodes JPEG files of one size, colour or grey, without EXIF or XMP. Arguments as `PlainPng`."""

    def __init__(self, height_px: int, width_px: int) -> None:
        self._size = (height_px, width_px)

    def decode(self, body: bytes) -> NDArray[np.uint8] | None:
        """As `PlainPng.decode`."""
        if not body.startswith(JPEG) or any(name in body for name in SAYS_MORE):
            return None
        try:
            height_px, width_px, colours, _ = simplejpeg.decode_jpeg_header(body)
            if (height_px, width_px) != self._size or colours not in PLAIN_COLOURS or is_endless(body):
                return None
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(body)
        except ValueError:  # damaged or unusual: left to Pillow
            return None
        return pixels


def _image_data(body: bytes, at: int) -> bytes | None:
    """The compressed pixels of a PNG file; None unless intact IDAT chunks and IEND are all that follow from `at` on."""
    parts: list[bytes] = []
    while True:
        n_bytes = int.from_bytes(body[at : at + 4], "big")
        kind, end = body[at + 4 : at + 8], at + 8 + n_bytes
        if kind not in (b"IDAT", b"IEND") or crc32(body[at + 4 : end]) != int.from_bytes(body[end : end + 4], "big"):
            return None
        if kind == b"IEND":
            return parts[0] if len(parts) == 1 else b"".join(parts)
        parts.append(body[at + 8 : end])
        at += CHUNK_FRAME_BYTES + n_bytes
