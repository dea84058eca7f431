"""When requests are meant to be sent: fixed before the first one is, whatever the server does."""

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


def poisson(rate: float, seconds: float, seed: int = 0) -> Times:
    """Independent arrivals: times in seconds from the start, [about rate x seconds], ascending."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, int(rate * seconds + 6 * (rate * seconds) ** 0.5) + 16)
    times = np.cumsum(gaps)
    return times[times < seconds]


def bursts(rate: float, seconds: float, burst_images: int, seed: int = 0) -> Times:
    """The same average rate, but in bursts of `burst_images` at once whose starts are independent."""
    return np.repeat(poisson(rate / burst_images, seconds, seed), burst_images)
