import numpy as np
import pytest

from training.reliability import expected_calibration_error


def test_perfectly_calibrated_confidence_has_no_error() -> None:
    confidence = np.repeat([0.25, 0.75], 400)
    correct = np.concatenate([np.arange(400) % 4 == 0, np.arange(400) % 4 != 0])
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.0, abs=1e-12)


def test_the_error_is_the_weighted_mean_distance_by_bin() -> None:
    # 100 images at 0.9 of which 60 are right, 300 at 0.5 of which 240 are: 0.25 x 0.3 + 0.75 x 0.3.
    confidence = np.repeat([0.9, 0.5], [100, 300])
    correct = np.concatenate([np.arange(100) < 60, np.arange(300) < 240])
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.3)


def test_confidences_of_0_and_1_have_bins() -> None:
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0.0
