"""Waiting for conditions instead of fixed times, so that tests pass on slow machines, too."""

from collections.abc import Callable
from time import monotonic, sleep

LIMIT_S = 60.0  # for what takes milliseconds on an idle machine


def wait_until(what: str, is_so: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Return once `is_so()` is true; fails with `what` after the limit."""
    end_s = monotonic() + limit_s
    while not is_so():
        assert monotonic() < end_s, f"waited {limit_s:g} s until {what}"
        sleep(0.005)
