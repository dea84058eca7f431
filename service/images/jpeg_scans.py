"""Reads the size and the number of scans from a JPEG file, to refuse those that would take too long to decode.

A progressive JPEG, or one with a scan per colour, has some ten scans. The decoder processes the whole image for each,
even for an empty scan of a dozen bytes, so that a file of a megabyte could occupy a thread for hours. A header of a
million segments, or megabytes of fill bytes, occupies Pillow for many seconds. (ITU T.81, annexes B and G.)
"""

import re

BEGINNING = b"\xff\xd8\xff"
MOST_SCANS = 100
SCAN = b"\xff\xda"
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # no stuffed byte, restart marker or fill byte
MOST_PIECES = 1000  # segments: a colour profile has up to 255, each of 100 scans a few
MOST_FILLING_BYTES = 1000  # before a segment of the header
COUNTED_BYTES = 1 << 20
END = 0xD9
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
WITHOUT_LENGTH = frozenset({0x01, 0xD8})


def is_endless(body: bytes) -> bool:
    """Whether a file is a JPEG with more than `MOST_SCANS` scans or `MOST_PIECES` segments, or too many fill bytes.

    Data after the end-of-image marker is ignored: it may be another image, or video.
    """
    if not body.startswith(BEGINNING):
        return False
    n_scans = n_components = n_pieces = 0
    in_passes = False
    at = 2
    while (marker := MARKER.search(body, at, len(body) if n_scans else at + MOST_FILLING_BYTES)) is not None:
        kind, at = body[marker.end() - 1], marker.end()
        n_pieces += 1
        if kind == END:
            return False
        if n_pieces > MOST_PIECES:
            return True
        if kind in FRAMES:
            in_passes, n_components = kind in PROGRESSIVE, _number(body, at + 7, 1)
        elif kind == SCAN[1]:
            n_scans += 1
            in_passes = in_passes or _number(body, at + 2, 1) < n_components
            if n_scans == 1 and (not in_passes or body.count(SCAN) <= MOST_SCANS):
                return False  # only the first scan is read, or there cannot be too many
            if n_scans > MOST_SCANS:
                return True
        if kind not in WITHOUT_LENGTH:
            at += _number(body, at, 2)
    return not n_scans and at + MOST_FILLING_BYTES < len(body)


def frame(body: bytes) -> tuple[int, int, int]:
    """Width, height and number of scans of a JPEG; zeros if its header is unusual.

    Scans are counted in the first megabyte only: longer files weigh more by their size, and counting takes 1 ns a byte.
    """
    at = 2
    for _ in range(MOST_PIECES):
        marker = MARKER.search(body, at, at + MOST_FILLING_BYTES)
        if marker is None:
            break
        kind, at = body[marker.end() - 1], marker.end()
        if kind in FRAMES:
            n_passes = body.count(SCAN, at, at + COUNTED_BYTES) if kind in PROGRESSIVE else 1
            return _number(body, at + 5, 2), _number(body, at + 3, 2), n_passes
        if kind not in WITHOUT_LENGTH:
            at += _number(body, at, 2)
    return 0, 0, 0


def _number(body: bytes, at: int, n_bytes: int) -> int:
    return int.from_bytes(body[at : at + n_bytes], "big")
