"""Arrival times of images."""

import numpy as np
from numpy.typing import NDArray


def poisson(rate_per_s: float, n_images: int, seed: int, burst_images: int = 1) -> NDArray[np.float64]:
    """Return arrival times [n_images] in seconds, ascending, of an open-loop Poisson process from time 0 on.

    Bursts of `burst_images` arrive at one moment, with exponential gaps between them, independently of any answers. The
    same seed gives the same gaps at every rate, up to their scale, so that rates can be compared.
    """
    rng = np.random.default_rng(seed)
    n_bursts = -(-n_images // burst_images)
    moments = np.cumsum(rng.exponential(burst_images / rate_per_s, n_bursts))
    return np.repeat(moments, burst_images)[:n_images]
