"""Starts `python -m training` from the command line."""

import os
import subprocess
import sys

from tests.data import REPOSITORY

PATIENCE_S = 120  # for busy machines; usually a few seconds


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
