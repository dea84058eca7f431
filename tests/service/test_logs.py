"""What a server prints: its log, and nothing beside it."""

import json
import logging
import subprocess
import sys

from service.logs import JsonFormatter
from tests.service.process import REPOSITORY, environment

# An EXIF note whose entries lie: Pillow warns of each, in words that are new each time.
PROGRAM = """
import io, struct, sys
from PIL import Image
from service.images.decoder import ImageDecoder
from service.logs import set_up_logs

set_up_logs("debug", as_json=True)
decoder = ImageDecoder(8, 8, max_pixels=10_000)
for i in range(3):
    entries = b"".join(struct.pack("<HHLL", tag, 7, 1000 + 100 * i + tag, 60_000) for tag in range(1, 90))
    exif = b"Exif\\0\\0II*\\0\\x08\\0\\0\\0" + struct.pack("<H", 89) + entries
    for file_format in ("PNG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (20, 20)).save(file, file_format, exif=exif)
        assert decoder.decode_now(file.getvalue()).shape == (8, 8, 3)
print(len(getattr(sys.modules["PIL.TiffImagePlugin"], "__warningregistry__", {})))
"""


def test_odd_pictures_leave_nothing_beside_the_log_and_nothing_in_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert int(done.stdout) <= 1  # its version, which Python keeps there


def test_a_line_is_not_lost_for_a_name_that_is_no_utf_8() -> None:
    record = logging.LogRecord("service", logging.ERROR, __file__, 1, "not read: %s", ("b\udcff",), None)
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert '"level":"error"' in line
    assert json.loads(line)["message"] == "not read: b\udcff"
