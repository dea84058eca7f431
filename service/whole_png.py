"""Pillow's reader of PNGs, which also sees where rows are missing, or data is damaged."""

from zlib import crc32

from PIL import Image, PngImagePlugin

from service.plain_images import CHECKSUM_BYTES, SIGNATURE

DATA_KINDS = frozenset({b"IDAT", b"fdAT"})


class WholePng(PngImagePlugin.PngImageFile):
    """A PNG whose compressed pixels reach Pillow's decoder without the checksum that ends them.

    The decoder takes that end for the picture's, even after too few rows; without it, such a picture is cut short.
    What the checksum would tell, those of the chunks do, at which Pillow does not look.
    """

    kept = b""

    def load_prepare(self) -> None:
        assert self.fp is not None
        self.fp.seek(0)
        if _is_damaged(self.fp.read()):
            raise OSError("a checksum of its pixels is wrong")
        super().load_prepare()

    def load_read(self, read_bytes: int) -> bytes:
        data = b""
        while not data and (more := super().load_read(read_bytes)):
            more = self.kept + more
            data, self.kept = more[:-CHECKSUM_BYTES], more[-CHECKSUM_BYTES:]
        return data


Image.register_open(WholePng.__name__, WholePng, lambda beginning: beginning.startswith(SIGNATURE))


def _is_damaged(body: bytes) -> bool:
    """Whether pixels are not those that were written. Where they are cut short, the decoder says so."""
    view = memoryview(body)
    at = len(SIGNATURE)
    while (end := at + 8 + int.from_bytes(body[at : at + 4], "big")) + 4 <= len(body):
        stated = int.from_bytes(body[end : end + 4], "big")
        if body[at + 4 : at + 8] in DATA_KINDS and crc32(view[at + 4 : end]) != stated:
            return True
        at = end + 4
    return False
