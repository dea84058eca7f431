"""Intact images for which the server lacks files, memory or threads: that is not the image's fault, and passes."""

import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from service.images.threads import Decoding
from tests.service.pictures import encoded
from tests.service.process import REPOSITORY, environment
from tests.waiting import LIMIT_S

WITHOUT_FILES = """
import resource, sys, service.api.app  # as a server does
from pathlib import Path
from service.images.decoder import ImageDecoder

bodies = [Path(name).read_bytes() for name in sys.argv[1:]]
decoder = ImageDecoder(8, 8, max_pixels=10_000)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
for name, body in zip(sys.argv[1:], bodies, strict=True):
    print(Path(name).name, decoder.decode_now(body).shape)
"""

WITHOUT_MEMORY = """
import resource, sys
from pathlib import Path
from service.errors import EngineError
from service.images.decoder import ImageDecoder

body = Path(sys.argv[1]).read_bytes()
decoder = ImageDecoder(8, 8, max_pixels=20_000_000)
used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 16 * 2**20, most))
try:
    decoder.decode_now(body)
except EngineError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(decoder.decode_now(body).shape)
"""


def printed_by(program: str, *files: Path) -> list[str]:
    arguments = [sys.executable, "-c", program, *map(str, files)]
    done = subprocess.run(arguments, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_images_of_every_kind_are_decoded_when_no_file_can_be_opened(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 20), "teal")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for file_format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        files.append(tmp_path / file_format)
        files[-1].write_bytes(encoded(picture, file_format))
    for file_format in ("PNG", "JPEG", "WEBP"):
        files.append(tmp_path / f"{file_format} on its side")
        files[-1].write_bytes(encoded(picture, file_format, exif=exif))
    assert printed_by(WITHOUT_FILES, *files) == [f"{file.name} (8, 8, 3)" for file in files]


def test_an_image_for_which_memory_is_short_is_not_called_damaged(tmp_path: Path) -> None:
    file = tmp_path / "large.png"  # 64 MB, decoded
    file.write_bytes(encoded(Image.new("RGB", (4000, 4000), "teal")))
    assert printed_by(WITHOUT_MEMORY, file) == ["the server has no memory left to decode it", "(8, 8, 3)"]


def test_images_that_found_no_thread_do_not_count_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    decoding = Decoding(len, 1, max_wait_s=1.0, weigh=lambda body: 10**9)
    with monkeypatch.context() as shortage:
        shortage.setattr(Thread, "start", fail)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="new thread"):
                decoding.submit(b"image")
    assert decoding.submit(b"image").result(LIMIT_S) == 5
    decoding.close()
