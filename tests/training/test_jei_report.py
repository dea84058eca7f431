"""The ablations of JEI-DNN's gates that the report of a gated run shows."""

import numpy as np

from training.jei.gates import Shown
from training.jei.record import GateRecord, Settings
from training.jei.report import _why
from training.predicting import mends


def part(n_images: int, seed: int) -> tuple[Shown, np.ndarray]:
    """Images whose first feature tells whether going on mends the answer, and the answers of three exits."""
    draw = np.random.default_rng(seed)
    correct = draw.random((n_images, 3)) < [0.4, 0.6, 0.8]
    features = draw.normal(size=(n_images, 3, 4))
    features[:, :, 0] += 2 * mends(correct)
    return Shown(features, np.zeros((n_images, 3))), correct


def test_ablations_score_held_out_images_by_weights_that_were_not_fitted_to_them() -> None:
    (heldout, correct), (test, test_correct) = part(400, 0), part(300, 1)
    draw = np.random.default_rng(2)
    by_fold, fold = draw.normal(size=(5, 3, 5)), draw.integers(0, 5, 400)
    gates = GateRecord(
        settings=Settings(0.3),
        source="run",
        gates=by_fold[0].tolist(),
        gates_by_fold=by_fold.tolist(),
        fold=fold.tolist(),
        ensemble=None,
        turns=(),
        kept=0,
    )
    alone, mending = _why(gates, (heldout, test), correct).values()
    for shown, weights, scores in (
        (heldout.features, by_fold[fold], alone[0]),
        (test.features, np.tile(by_fold[:1], (300, 1, 1)), alone[1]),
    ):
        np.testing.assert_allclose(scores, (shown * weights[:, :, :-1]).sum(axis=2) + weights[:, :, -1])
    for scores, happens in ((mending[0], mends(correct)), (mending[1], mends(test_correct))):
        for i in (0, 1):  # an image that going on mends should stay
            assert scores[~happens[:, i], i].mean() > scores[happens[:, i], i].mean() + 2
    turned = correct.copy()
    turned[7] = ~turned[7]
    _, again = _why(gates, (heldout, test), turned).values()
    assert np.array_equal(again[0][7], mending[0][7])
    assert not np.array_equal(again[1], mending[1])
