"""Fitting the boosted ensemble to held-out images, with logits whose best sum is known."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.boosting import Boosting
from training.ensemble import fit_ensemble

N_IMAGES, N_CLASSES = 4000, 5


@pytest.fixture(scope="module")
def known() -> tuple[list[Tensor], Tensor, Boosting]:
    """Heads, with labels drawn from the softmax of their sum with t = (., 0.8, 0.3) and s = (0.5, 2, 1)."""
    draw = torch.Generator().manual_seed(0)
    true = Boosting([0.0, 0.8, 0.3], scales=[0.5, 2.0, 1.0])
    labels = torch.randint(0, N_CLASSES, (N_IMAGES,), generator=draw)
    # Independent normal evidence about the label, whose log-likelihood ratios are the optimal logits.
    evidence = [
        strength * functional.one_hot(labels, N_CLASSES) + torch.randn(N_IMAGES, N_CLASSES, generator=draw)
        for strength in (1.0, 1.5, 1.2)
    ]
    first = 1.0 * evidence[0] / 0.5
    # F_2 is 1.0 e_0 + 1.5 e_1, which includes 0.8 F_1; F_3 is 0.3 F_2 plus its own head.
    second = (1.0 * evidence[0] + 1.5 * evidence[1] - 0.8 * evidence[0]) / 2.0
    third = evidence[0] + 1.5 * evidence[1] + 1.2 * evidence[2] - 0.3 * (evidence[0] + 1.5 * evidence[1])
    return [first, second, third], labels, true


def test_the_best_sum_is_found(known: tuple[list[Tensor], Tensor, Boosting]) -> None:
    heads, labels, true = known
    fitted = fit_ensemble(heads, labels, [0.5, 0.5, 0.5])
    assert fitted.temperatures[0] == 0.0
    assert fitted.temperatures[1:] == pytest.approx(true.temperatures[1:], abs=0.15)
    assert fitted.head_scales == pytest.approx(true.scales, rel=0.15)
    for ours, best in zip(fitted.build()(heads), true(heads), strict=True):
        assert functional.cross_entropy(ours, labels) <= functional.cross_entropy(best, labels) + 1e-4


def test_overconfident_logits_are_calibrated(known: tuple[list[Tensor], Tensor, Boosting]) -> None:
    heads, labels, true = known
    [fitted, *_] = fit_ensemble([7 * heads[0]], labels, [0.5]).build()([7 * heads[0]])
    torch.testing.assert_close(fitted, true([heads[0]] * 3)[0], rtol=0.1, atol=0.0)


def test_few_images_hardly_change_the_trained_values() -> None:
    labels = torch.arange(4)
    heads = [10.0 * torch.eye(4), 10.0 * torch.eye(4)]  # all correct: maximum likelihood would diverge
    fitted = fit_ensemble(heads, labels, [0.5, 0.5])
    assert fitted.temperatures == pytest.approx((0.0, 0.5), abs=0.1)
    assert fitted.head_scales == pytest.approx((1.0, 1.0), abs=0.1)


def test_it_survives_a_json_round_trip() -> None:
    fitted = fit_ensemble([torch.eye(3), torch.eye(3)], torch.arange(3), [0.5, 0.5])
    assert type(fitted).model_validate_json(fitted.model_dump_json()) == fitted
    assert np.isfinite([*fitted.temperatures, *fitted.head_scales]).all()
