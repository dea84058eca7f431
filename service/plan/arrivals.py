"""When images come."""

import numpy as np
from numpy.typing import NDArray


def poisson(rate_per_s: float, n_images: int, seed: int, burst_images: int = 1) -> NDArray[np.float64]:
    """Return the times [n_images], ascending from 0, at which images come on their own.

    Bursts of `burst_images` at one moment, exponential gaps between them: nobody waits for an answer before the next is
    sent. The same seed gives the same gaps at every rate, but for their scale, so that rates can be compared.
    """
    rng = np.random.default_rng(seed)
    n_bursts = -(-n_images // burst_images)
    moments = np.cumsum(rng.exponential(burst_images / rate_per_s, n_bursts))
    return np.repeat(moments, burst_images)[:n_images]
