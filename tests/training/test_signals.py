"""Signals for whether going on helps: fitted on some images, evaluated on others, compared with the logit margin."""

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from models.predictor import FEATURES
from tests.training import tiny
from training.augment import DeviceImages
from training.calibration import ExitOutputs, calibrate
from training.checkpoint import RunFolder
from training.image_set import DataError, Split
from training.loop import Trainer
from training.predicting import fit_exits
from training.processes import Processes
from training.signals import (
    MARGIN,
    PAPER,
    Seen,
    _this_head,
    _two_heads,
    _with_inputs,
    apply,
    crossfit_columns,
    fitted_signals,
    judge,
    judged,
    plain_signals,
)
from training.signals_report import print_signals, write_signals

CPU = torch.device("cpu")
COSTS = (10.0, 20.0, 40.0)


def seen(n_images: int, seed: int, tells: float) -> Seen:
    """Images whose first head input predicts with the given strength whether going on helps, with random logits."""
    draw = np.random.default_rng(seed)
    correct = draw.random((n_images, 3)) < [0.4, 0.5, 0.7]
    names = ("max_softmax", "logit_margin", "probability_margin", "entropy")
    scores = {name: draw.normal(size=(n_images, 3)).astype(np.float32) for name in names}
    features = draw.normal(size=(n_images, 3, len(FEATURES))).astype(np.float32)
    labels = np.zeros(n_images, dtype=np.int64)
    outputs = ExitOutputs(labels, np.where(correct, 0, 1), correct, correct, scores, features)
    inputs = draw.normal(size=(n_images, 3, 4)).astype(np.float32)
    inputs[:, :, 0] += tells * Seen(outputs, inputs).mends
    return Seen(outputs, inputs)


def test_going_on_helps_if_an_answer_is_wrong_and_a_later_one_right() -> None:
    part = seen(50, 0, 0.0)
    for row, answers in zip(part.mends, part.outputs.correct, strict=True):
        assert row.tolist() == [not answers[n] and bool(answers[n + 1 :].any()) for n in range(3)]


def test_a_fit_gives_the_log_odds_of_the_event() -> None:
    part = seen(20_000, 1, 2.0)
    log_odds = apply(fit_exits(part.inputs, part.mends), part.inputs)
    for n in range(2):  # calibrated on average, and better than chance
        assert (1 / (1 + np.exp(-log_odds[:, n]))).mean() == pytest.approx(part.mends[:, n].mean(), rel=0.01)
        assert log_odds[part.mends[:, n], n].mean() > log_odds[~part.mends[:, n], n].mean() + 2
    assert np.all(log_odds[:, 2] == 0)  # nothing follows the last exit


def test_a_held_out_image_is_scored_by_weights_that_were_not_fitted_to_it() -> None:
    part = seen(60, 2, 1.0)
    happens = part.mends
    before = crossfit_columns(part.inputs, happens, 3.0)
    happens[7] = ~happens[7]
    after = crossfit_columns(part.inputs, happens, 3.0)
    assert np.array_equal(before[7], after[7])
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("columns", [_this_head, _two_heads, _with_inputs])
def test_an_exit_does_not_see_later_ones(columns: Callable[[Seen], np.ndarray]) -> None:
    part = seen(20, 4, 1.0)

    def with_other_scores(exit_index: int) -> np.ndarray:
        changed = {name: values.copy() for name, values in part.outputs.scores.items()}
        for values in changed.values():
            values[:, exit_index] += 1
        return columns(Seen(replace(part.outputs, scores=changed), part.inputs))

    sees = [
        [not np.array_equal(with_other_scores(changed)[:, i], columns(part)[:, i]) for changed in range(3)]
        for i in range(3)
    ]
    assert sees == [[j == i or (columns is not _this_head and j == i - 1) for j in range(3)] for i in range(3)]


def test_gates_are_fitted_to_training_images_alone() -> None:
    train, heldout, test = (seen(80, i, 1.0) for i in range(3))
    turned = Seen(replace(heldout.outputs, correct=~heldout.outputs.correct), heldout.inputs)
    first, again, other = (
        next(signal for signal in fitted_signals(*parts) if signal.name == "the head's inputs")
        for parts in ((train, heldout, test), (train, turned, test), (seen(80, 3, 1.0), heldout, test))
    )
    assert np.array_equal(first.heldout, again.heldout)
    assert np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


def test_informative_head_inputs_are_detected_and_noise_is_not() -> None:
    for tells, n_sure in ((3.0, 0.05), (0.0, 0.0)):
        train, heldout, test = (seen(n, i, tells) for i, n in enumerate((2000, 600, 600)))
        signals = [*plain_signals(heldout, test), *fitted_signals(train, heldout, test)]
        results = judged(signals, heldout.outputs.correct, test.outputs.correct, COSTS)
        by_name = {result.signal.name: result for result in results}
        assert by_name[MARGIN.score].over_margin == (0.0, 0.0)
        assert by_name[MARGIN.score].test_over_margin.mean == 0.0
        gate, logits = by_name["the head's inputs"], by_name["margins and agreement of two heads"]
        assert (gate.signal.fitted_on, logits.signal.fitted_on) == ("training images", "held-out images")
        if tells:
            assert gate.over_margin[0] > n_sure + 3 * gate.over_margin[1]
            assert gate.test_over_margin.mean > n_sure + 3 * gate.test_over_margin.error
        for result in [logits] if tells else results:  # noise has no large lead
            assert abs(result.over_margin[0]) < max(0.01, 4 * result.over_margin[1])


# A network whose heads are as wide as the maps that they read, like those for photographs.
WIDENING = {"config": "I-4", "n_blocks": 3, "base": 1, "step": 1, "n_channels": 8, "growth_rate": 4}
WIDENING |= {"growth_factors": [1], "bottleneck_factors": [1]}


@pytest.mark.parametrize(("gates", "network"), [(0.0, {}), (0.3, {"arguments": WIDENING})])
def test_signals_of_a_run_are_printed_and_saved(
    tmp_path: Path, gates: float, network: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, folder = tiny.image_set(tmp_path / "cifar"), RunFolder(tmp_path / "run")
    recipe = tiny.recipe(objective={"gates": gates}, network=network)
    Trainer(recipe, images, folder, 0, Processes(0, 1, CPU)).train()
    calibrate(folder, images, CPU)
    moved, augmented = list[int](), DeviceImages.augmented

    def noted(self: DeviceImages, rows: torch.Tensor, draws: torch.Generator) -> object:
        moved.extend(self.labels[rows].tolist())
        return augmented(self, rows, draws)

    monkeypatch.setattr(DeviceImages, "augmented", noted)
    results = judge(folder, images, CPU)
    assert moved == images.train_labels[Split.load(folder.split, tiny.N_TRAIN).train].tolist()  # and no others
    names = [result.signal.name for result in results]
    assert names[:2] == [PAPER.score, MARGIN.score]
    assert ("gates trained with the network" in names) == bool(gates)
    for outputs, part in ((ExitOutputs.load(folder.heldout), "heldout"), (ExitOutputs.load(folder.test), "test")):
        assert np.allclose(getattr(results[1].signal, part), outputs.scores[MARGIN.score], atol=1e-4)
    write_signals(results, tmp_path / "signals.csv")
    with (tmp_path / "signals.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["signal"] for row in rows] == names
    assert float(rows[0]["test_lead_over_margin"]) == pytest.approx(100 * results[0].test_over_margin.mean, abs=1e-3)
    console = Console(record=True, width=200, file=io.StringIO())
    print_signals(results, console)
    assert f"{100 * results[-1].over_margin[0]:+.2f}" in console.export_text()
    with pytest.raises(DataError, match="added, removed or renamed"):  # the held-out images are no longer known
        judge(folder, replace(images, train_labels=images.train_labels[::-1].copy()), CPU)
