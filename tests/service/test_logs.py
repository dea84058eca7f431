"""The output of a server: its log and nothing else."""

import json
import logging
import subprocess
import sys

from service.logs import JsonFormatter
from tests.service.process import REPOSITORY, environment

# EXIF data with invalid entries: Pillow warns of each, with a different text each time.
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


def test_warnings_of_pillow_are_neither_printed_nor_kept_in_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert int(done.stdout) <= 1  # the registry's own "version" entry


def test_file_names_that_are_not_utf_8_can_be_logged() -> None:
    record = logging.LogRecord("service", logging.ERROR, __file__, 1, "not read: %s", ("b\udcff",), None)
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert '"level":"error"' in line
    assert json.loads(line)["message"] == "not read: b\udcff"
