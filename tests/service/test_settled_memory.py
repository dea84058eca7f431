"""What Python's collector leaves alone once the server is warm, and what it must not leave alone for long."""

import subprocess
import sys

from tests.service.process import REPOSITORY

CIRCLES = """
import gc
from collections import deque
from service.server import settle_memory

warm = [[] for _ in range(400_000)]  # as what a server has loaded
settle_memory()
in_work, most = deque(maxlen=100_000), 0
for n in range(1_500_000):
    circle = []
    circle.append(circle)
    in_work.append(circle)  # long enough to be old when it ends
    if n % 10_000 == 0:
        most = max(most, len(gc.get_objects()))
print(most)
"""


def test_requests_that_end_in_a_circle_do_not_pile_up() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CIRCLES], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(run.stdout) < 1_000_000
