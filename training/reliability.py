"""Reliability of confidence: of images answered with a confidence of 0.8, are 80 % right?"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

N_BINS = 15


def expected_calibration_error(confidence: NDArray[np.floating[Any]], correct: NDArray[np.bool_]) -> float:
    """Mean distance between confidence and accuracy over images [M], in bins of equal width (Guo et al., ICML 2017)."""
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    surplus = np.bincount(bins, weights=confidence - correct, minlength=N_BINS)  # summed over each bin's images
    return float(np.abs(surplus).sum() / len(correct))
