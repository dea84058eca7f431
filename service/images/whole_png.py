"""Pillow's PNG reader with checks for missing rows, damaged data, and files that would take long to open."""

from collections.abc import Iterator
from zlib import crc32

from PIL import Image, PngImagePlugin

from service.images.plain import SIGNATURE

# Pillow takes 5 us per chunk. Most programs write chunks of 8 KiB, some of one row.
MOST_CHUNKS, BYTES_A_CHUNK = 1000, 64
# Compressed chunks, which Pillow decompresses: a kilobyte to up to a megabyte each.
PROFILE = b"iCCP"
PACKED_KINDS = frozenset({PROFILE, b"zTXt", b"iTXt"})
MOST_PACKED = 2
DATA_KINDS = frozenset({b"IDAT", b"fdAT"})


class WholePng(PngImagePlugin.PngImageFile):
    """A PNG reader that withholds the last byte of the compressed pixels, part of a checksum, from the decoder.

    Pillow's decoder accepts the end of the compressed data as the end of the image, even if rows are missing. Without
    that byte it reports such an image as truncated. In place of that checksum, those of the chunks are verified, which
    Pillow ignores. No more is withheld: the decoder needs the bytes before to return the last rows, if well compressed.
    """

    last = b""

    def load_prepare(self) -> None:
        assert self.fp is not None
        self.fp.seek(0)
        if _is_damaged(self.fp.read()):
            raise OSError("the checksum of its pixels is wrong")
        super().load_prepare()

    def load_read(self, read_bytes: int) -> bytes:
        data = b""
        while not data and (more := super().load_read(read_bytes)):
            more = self.last + more
            data, self.last = more[:-1], more[-1:]
        return data


Image.register_open(WholePng.__name__, WholePng, lambda beginning: beginning.startswith(SIGNATURE))


def unpacks_much(body: bytes) -> bool:
    """Whether opening a PNG may take milliseconds, however few bytes and pixels it has."""
    return sum(kind in PACKED_KINDS for kind, _, _ in _chunks(body)) > MOST_PACKED


def has_too_many_chunks(body: bytes) -> bool:
    """Whether opening or reading a PNG may take seconds for chunks that its pixels do not need."""
    most = MOST_CHUNKS + len(body) // BYTES_A_CHUNK
    n_profiles = 0
    for n_chunks, (kind, _, _) in enumerate(_chunks(body)):
        n_profiles += kind == PROFILE
        if n_chunks > most or n_profiles > 1:  # the specification allows one profile
            return True
    return False


def _is_damaged(body: bytes) -> bool:
    """Whether the checksum of a chunk of pixels is wrong. The decoder itself detects truncated files."""
    view = memoryview(body)
    return any(
        kind in DATA_KINDS and crc32(view[start:end]) != int.from_bytes(body[end : end + 4], "big")
        for kind, start, end in _chunks(body)
        if end + 4 <= len(body)
    )


def _chunks(body: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's kind, start and end (exclusive) of what its checksum covers; nothing if this is not a PNG."""
    at = len(SIGNATURE)
    while body.startswith(SIGNATURE) and at < len(body):
        start, end = at + 4, at + 8 + int.from_bytes(body[at : at + 4], "big")
        yield body[start : start + 4], start, end
        at = end + 4
