"""`python -m training`, started as a person starts it."""

import os
import subprocess
import sys

from tests.data import REPOSITORY

PATIENCE_S = 120  # for a busy machine; it takes a few


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
