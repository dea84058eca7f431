"""Every benchmark that loads a bundle or images itself tells in a sentence what is wrong with them."""

import subprocess
import sys

import pytest

from tests.service.process import REPOSITORY


@pytest.mark.parametrize("name", ["engine", "plan_check", "degrade", "http_cost", "precision", "league"])
def test_a_wrong_bundle_is_no_stack_trace(name: str) -> None:
    asked = [sys.executable, "-m", f"benchmarks.{name}", "--bundle", "nowhere"]
    done = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: nowhere: there is no such folder; give the folder of a bundle")
    assert "Traceback" not in done.stderr
