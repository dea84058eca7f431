"""Pillow's reader of PNGs, which also sees where rows are missing, or data is damaged, and what would keep it long."""

from collections.abc import Iterator
from zlib import crc32

from PIL import Image, PngImagePlugin

from service.images.plain import SIGNATURE

# Pillow takes 5 us a chunk. Most programs write 8 KiB a chunk, some a row.
MOST_CHUNKS, BYTES_A_CHUNK = 1000, 64
# Pillow unpacks what they hold, up to a megabyte of a kilobyte each.
PROFILE = b"iCCP"
PACKED_KINDS = frozenset({PROFILE, b"zTXt", b"iTXt"})
MOST_PACKED = 2
DATA_KINDS = frozenset({b"IDAT", b"fdAT"})


class WholePng(PngImagePlugin.PngImageFile):
    """A PNG whose compressed pixels reach Pillow's decoder without their last byte, one of the checksum that ends them.

    The decoder takes that end for the picture's, even after too few rows; without it, such a picture is cut short.
    What the checksum would tell, those of the chunks do, at which Pillow does not look. All of it cannot be kept back:
    the decoder needs bytes before it to give the last rows, where these are packed well.
    """

    last = b""

    def load_prepare(self) -> None:
        assert self.fp is not None
        self.fp.seek(0)
        if _is_damaged(self.fp.read()):
            raise OSError("a checksum of its pixels is wrong")
        super().load_prepare()

    def load_read(self, read_bytes: int) -> bytes:
        data = b""
        while not data and (more := super().load_read(read_bytes)):
            more = self.last + more
            data, self.last = more[:-1], more[-1:]
        return data


Image.register_open(WholePng.__name__, WholePng, lambda beginning: beginning.startswith(SIGNATURE))


def unpacks_much(body: bytes) -> bool:
    """Whether to open a PNG may take milliseconds, however few bytes and pixels it has."""
    return sum(kind in PACKED_KINDS for kind, _, _ in _chunks(body)) > MOST_PACKED


def has_too_many_chunks(body: bytes) -> bool:
    """Whether to open a PNG, or to read it, would take seconds for what its pixels do not need."""
    most = MOST_CHUNKS + len(body) // BYTES_A_CHUNK
    n_profiles = 0
    for n_chunks, (kind, _, _) in enumerate(_chunks(body)):
        n_profiles += kind == PROFILE
        if n_chunks > most or n_profiles > 1:  # the specification allows one profile
            return True
    return False


def _is_damaged(body: bytes) -> bool:
    """Whether pixels are not those that were written. Where they are cut short, the decoder says so."""
    view = memoryview(body)
    return any(
        kind in DATA_KINDS and crc32(view[start:end]) != int.from_bytes(body[end : end + 4], "big")
        for kind, start, end in _chunks(body)
        if end + 4 <= len(body)
    )


def _chunks(body: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each, and where that begins and where the checksum over it and what follows it stands; none: no PNG."""
    at = len(SIGNATURE)
    while body.startswith(SIGNATURE) and at < len(body):
        start, end = at + 4, at + 8 + int.from_bytes(body[at : at + 4], "big")
        yield body[start : start + 4], start, end
        at = end + 4
