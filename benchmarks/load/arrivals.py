"""Arrival times of requests: fixed before the first is sent, so independent of how the server behaves."""

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


def poisson(rate: float, seconds: float, seed: int = 0) -> Times:
    """Independent arrivals: ascending times in seconds from the start, about `rate` x `seconds` of them."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, int(rate * seconds + 6 * (rate * seconds) ** 0.5) + 16)
    times = np.cumsum(gaps)
    return times[times < seconds]


def bursts(rate: float, seconds: float, burst_images: int, seed: int = 0) -> Times:
    """Bursts of `burst_images` requests at independent times; `rate` is still the average of requests per second."""
    return np.repeat(poisson(rate / burst_images, seconds, seed), burst_images)
