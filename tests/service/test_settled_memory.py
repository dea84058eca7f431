"""Garbage collection in a warm server: what it skips, and what it must still collect."""

import platform
import subprocess
import sys

import pytest

from tests.service.process import REPOSITORY

CIRCLES = """
import gc
from collections import deque
from service.settled_memory import settle_memory

warm = [[] for _ in range(400_000)]  # stands for what a server has loaded
settle_memory()
in_work, most = deque(maxlen=100_000), 0
for n in range(1_500_000):
    circle = []
    circle.append(circle)
    in_work.append(circle)  # kept until it is in the oldest generation
    if n % 10_000 == 0:
        most = max(most, len(gc.get_objects()))
print(most)
"""


def test_reference_cycles_of_requests_are_collected() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CIRCLES], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(run.stdout) < 1_000_000


IN_FLIGHT = """
import gc, sys
from service.settled_memory import settle_memory

settle_memory(int(sys.argv[1]))
looks = []
gc.callbacks.append(lambda phase, info: looks.append(phase))
held = [[] for _ in range(int(sys.argv[2]))]
print(looks.count("start"))
"""


@pytest.mark.parametrize(
    ("max_in_flight", "n_objects", "n_looks"),
    [(0, 4_900, 0), (0, 5_100, 1), (8_192, 32_000, 0), (8_192, 33_000, 1), (1_000_000, 101_000, 1)],
)
def test_objects_of_images_in_flight_do_not_trigger_a_collection(
    max_in_flight: int, n_objects: int, n_looks: int
) -> None:
    command = [sys.executable, "-c", IN_FLIGHT, str(max_in_flight), str(n_objects)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    assert int(run.stdout) == n_looks


LEFT_OVER = """
from pathlib import Path
from service.server import use_one_heap
from service.settled_memory import settle_memory

def resident_mb():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1e3

use_one_heap()
blocks = [bytearray(1000) for _ in range(100_000)]
blocks = blocks[::5000]  # the remaining few keep the heap from shrinking by itself
before_mb = resident_mb()
settle_memory()
print(before_mb - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_memory_freed_after_loading_is_returned_to_the_system() -> None:
    run = subprocess.run(
        [sys.executable, "-c", LEFT_OVER], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert float(run.stdout) > 80
