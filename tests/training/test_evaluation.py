import csv
import io
import itertools
import json
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from models.cost import NetworkCost, measure_cost
from models.frontier import FAMILIES
from models.msdnet import CONFIGS, MSDNet
from models.predictor import FEATURES
from training.bounds import bound_curve, oracle_exits, steady_exits
from training.calibration import CalibrationRecord, ExitOutputs
from training.checkpoint import RunError, RunFolder
from training.evaluation import Evaluation, calibration_of, evaluate
from training.plots import plot_anytime, plot_budgeted, plot_frontier, plot_policies, plot_training
from training.policies import PAPER, Policy
from training.predicting import FITTED
from training.published import CIFAR100_ANYTIME, CIFAR100_BUDGETED
from training.reliability import expected_calibration_error
from training.tables import print_evaluation, write_tables

EXECUTED = (10_000_000, 20_000_000, 40_000_000)
PUBLISHED = (12_000_000, 21_000_000, 40_000_000)
PUBLISHED_MACS, EXECUTED_MACS = (11_000_000, 19_000_000, 38_000_000), (9_000_000, 18_000_000, 37_000_000)
COST = NetworkCost(PUBLISHED, EXECUTED, PUBLISHED_MACS, EXECUTED_MACS, (1, 2, 3))
EXECUTED_M, PUBLISHED_M = (10.0, 20.0, 40.0), (12.0, 21.0, 40.0)


def outputs(n_images: int, seed: int) -> ExitOutputs:
    """Three exits, increasingly accurate; `logit_margin` predicts correctness well, `max_softmax` hardly."""
    draw = np.random.default_rng(seed)
    ease = draw.normal(size=(n_images, 1)) + draw.normal(size=(n_images, 3)) * 0.3
    correct = ease + np.array([0.0, 0.5, 1.0]) > 0
    predictions = np.where(correct, 0, 1)
    scores = {
        "logit_margin": (ease + 0.3 * draw.normal(size=ease.shape)).astype(np.float32),
        "max_softmax": (ease + 5.0 * draw.normal(size=ease.shape)).astype(np.float32),
    }
    features = np.zeros((n_images, 3, len(FEATURES)), np.float32)
    features[:, :, FEATURES.index("logit_margin")] = scores["logit_margin"]
    among_five = correct | (draw.random(correct.shape) < 0.5)
    return ExitOutputs(np.zeros(n_images, np.int64), predictions, correct, among_five, scores, features)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(outputs(1000, 1), outputs(2000, 2), COST)


@pytest.fixture(scope="module")
def record() -> CalibrationRecord:
    return CalibrationRecord(
        step=5,
        epochs=1.0,
        seconds=1.0,
        scores=[],
        data_name="cifar100",
        split_sha256="0" * 64,
        train_images=1,
        heldout_images=1000,
        test_images=2000,
        class_names=["a", "b"],
        image_size_px=32,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )


def test_every_exit_is_measured(evaluation: Evaluation) -> None:
    heldout, test = outputs(1000, 1), outputs(2000, 2)
    assert [r.exit for r in evaluation.exits] == [1, 2, 3]
    assert [r.executed_mflops for r in evaluation.exits] == list(EXECUTED_M)
    assert [r.published_mflops for r in evaluation.exits] == list(PUBLISHED_M)
    assert [r.test_accuracy for r in evaluation.exits] == test.correct.mean(0).tolist()
    assert [r.heldout_accuracy for r in evaluation.exits] == heldout.correct.mean(0).tolist()
    assert [r.test_top5_accuracy for r in evaluation.exits] == test.correct_top5.mean(0).tolist()
    errors = [expected_calibration_error(test.confidence[:, i], test.correct[:, i]) for i in range(3)]
    assert [r.test_calibration_error for r in evaluation.exits] == errors
    assert [r.parameters for r in evaluation.exits] == [1, 2, 3]
    told = evaluation.manifest_fields()["exits"]
    assert [exit_["macs_m"] for exit_ in told] == [n / 1e6 for n in PUBLISHED_MACS]
    assert [exit_["executed_macs_m"] for exit_ in told] == [n / 1e6 for n in EXECUTED_MACS]


def test_the_more_informative_score_is_chosen(evaluation: Evaluation) -> None:
    """A score fitted on the margin is as informative as the margin."""
    assert evaluation.policy.score in ("logit_margin", "as_good", "expected_gain")
    assert evaluation.chosen.crossfit_lead > 5 * evaluation.chosen.crossfit_lead_error > 0
    paper = evaluation.result(PAPER)
    assert paper.crossfit_lead == 0
    assert evaluation.chosen.crossfit_accuracy - paper.crossfit_accuracy == pytest.approx(
        evaluation.chosen.crossfit_lead
    )
    lead = evaluation.comparison.of(evaluation.policy).mean_lead
    assert 0 < lead.low < lead.mean < lead.high


def test_the_choice_does_not_use_the_test_images(evaluation: Evaluation) -> None:
    heldout, test = outputs(1000, 1), outputs(2000, 2)
    swapped = {"logit_margin": test.scores["max_softmax"], "max_softmax": test.scores["logit_margin"]}
    misled = evaluate(heldout, replace(test, scores=swapped, correct=~test.correct), COST)
    assert misled.policy == evaluation.policy
    assert misled.predictor == evaluation.predictor
    assert [r.crossfit_lead for r in misled.policies] == [r.crossfit_lead for r in evaluation.policies]


def test_no_policys_thresholds_use_the_test_images(evaluation: Evaluation) -> None:
    """The held-out results of every policy are the same, whatever the test images."""
    other = evaluate(outputs(1000, 1), outputs(500, 9), COST)
    for one, another in zip(evaluation.policies, other.policies, strict=True):
        for point, same in zip(one.points, another.points, strict=True):
            assert (point.heldout_mflops, point.heldout_accuracy) == (same.heldout_mflops, same.heldout_accuracy)
    assert evaluation.chosen.points[20].test_accuracy != other.chosen.points[20].test_accuracy


def test_the_bundle_gets_the_chosen_policy(evaluation: Evaluation) -> None:
    fields = evaluation.manifest_fields()
    heldout = outputs(1000, 1)
    calibration = calibration_of(heldout)
    assert set(calibration.scores) == {"logit_margin", "max_softmax", *FITTED}
    assert fields["score"] in calibration.scores
    assert fields["family"] in FAMILIES
    assert (fields["predictor"] is not None) == (fields["score"] in FITTED)
    assert np.array_equal(calibration.scores["as_good"], calibration_of(heldout).scores["as_good"])


def test_budgets_are_kept_on_held_out_images_and_measured_on_test_images(evaluation: Evaluation) -> None:
    for result in evaluation.policies:
        for point in result.points:
            assert point.heldout_mflops <= point.budget_mflops + 1e-9
            within_reach = min(point.budget_mflops, result.points[-1].heldout_mflops)
            assert point.heldout_mflops >= within_reach - EXECUTED_M[-1] / 1000  # one image
            assert sum(point.test_shares) == pytest.approx(1)
            assert point.test_executed_mflops == pytest.approx(np.dot(point.test_shares, EXECUTED_M))
            assert point.test_published_mflops == pytest.approx(np.dot(point.test_shares, PUBLISHED_M))
            assert abs(point.test_executed_mflops - point.heldout_mflops) < 1.5  # two samples of one distribution
    costs = [point.test_executed_mflops for point in evaluation.chosen.points]
    assert costs == sorted(costs)
    assert evaluation.chosen.points[0].test_shares == (1.0, 0.0, 0.0)


def test_tables_cover_the_curve_without_repetition(evaluation: Evaluation) -> None:
    shown = evaluation.chosen.shown(5)
    costs = [point.heldout_mflops for point in shown]
    assert costs == sorted(set(costs))
    assert costs[0] == evaluation.chosen.points[0].heldout_mflops
    assert costs[-1] == evaluation.chosen.points[-1].heldout_mflops


def test_the_policy_chosen_lies_between_the_two_oracles(evaluation: Evaluation) -> None:
    xs, ys = [p.executed_mflops for p in evaluation.oracle], [p.accuracy for p in evaluation.oracle]
    for point, random in zip(evaluation.chosen.points, evaluation.random, strict=True):
        assert random.executed_mflops == pytest.approx(point.test_executed_mflops)
        assert point.test_accuracy <= np.interp(point.test_executed_mflops, xs, ys)
    leads = [p.test_accuracy - r.accuracy for p, r in zip(evaluation.chosen.points, evaluation.random, strict=True)]
    assert np.mean(leads) > 0.01
    reached = evaluation.comparison.headroom
    assert 0 < reached.low < reached.mean < reached.high < 1
    assert evaluation.comparison.steady_headroom.mean > reached.mean
    assert evaluation.random[0].accuracy == pytest.approx(evaluation.exits[0].test_accuracy)


def test_no_rule_beats_the_oracle() -> None:
    """Checked against all 3^7 ways in which seven images can leave."""
    correct = np.random.default_rng(3).random((7, 3)) < 0.5
    curve = bound_curve(oracle_exits(correct), correct, EXECUTED_M, PUBLISHED_M)
    steady = bound_curve(steady_exits(correct), correct, EXECUTED_M, PUBLISHED_M)
    xs, ys = [point.executed_mflops for point in curve], [point.accuracy for point in curve]
    assert xs == sorted(xs)
    assert ys[-1] == correct.any(axis=1).mean()
    reached = set()
    for ways in itertools.product(range(3), repeat=7):
        left_at = np.array(ways)
        cost, accuracy = np.mean(np.array(EXECUTED_M)[left_at]), correct[np.arange(7), left_at].mean()
        assert accuracy <= np.interp(cost, xs, ys) + 1e-9
        reached.add((round(cost, 6), round(accuracy, 6)))
    assert all((round(x, 6), round(y, 6)) in reached for x, y in zip(xs, ys, strict=True))
    assert (
        steady[-1].accuracy == (correct[:, 0] | correct[:, -1]).mean()
    )  # images that are right at the first or the last exit
    assert all(p.accuracy <= np.interp(p.executed_mflops, xs, ys) + 1e-9 for p in steady)


def test_results_can_be_reloaded(tmp_path: Path, evaluation: Evaluation, record: CalibrationRecord) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match="not evaluated yet"):
        Evaluation.load(folder, record)
    evaluation.save(folder, record)
    assert Evaluation.load(folder, record) == evaluation
    assert write_tables(folder, evaluation) == ["anytime.csv", "budgeted.csv", "policies.csv"]
    with (tmp_path / "anytime.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_accuracy"]) for row in rows] == [r.test_accuracy for r in evaluation.exits]
    with (tmp_path / "budgeted.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(r.points) for r in evaluation.policies)
    assert all(sum(float(row[f"share_{n}"]) for n in (1, 2, 3)) == pytest.approx(1, abs=1e-4) for row in rows)
    with (tmp_path / "policies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(evaluation.policies) * len(evaluation.comparison.costs_mflops)
    assert all(float(row["lead_mean"]) == 0 for row in rows if (row["score"], row["family"]) == astuple(PAPER))
    with pytest.raises(RunError, match="evaluate again"):
        Evaluation.load(folder, record.model_copy(update={"step": 6}))
    folder.results.write_text(json.dumps({"step": 5}))
    with pytest.raises(RunError, match="evaluate again"):
        Evaluation.load(folder, record)


def test_plots_are_drawn(tmp_path: Path, evaluation: Evaluation) -> None:
    log = [{"epoch": n, "losses": [3 / n, 2 / n], "held_out_accuracy": [n / 9, n / 8]} for n in (1, 2, 3)]
    plot_training(tmp_path / "training.png", "tiny", log)
    plot_frontier(tmp_path / "frontier.png", "tiny", evaluation)
    plot_policies(tmp_path / "policies.png", "tiny", evaluation)
    plot_anytime(tmp_path / "anytime.png", "tiny", evaluation, is_cifar100=True)
    plot_budgeted(tmp_path / "budgeted.png", "tiny", evaluation, is_cifar100=True)
    plot_budgeted(tmp_path / "own.png", "tiny", evaluation, is_cifar100=False)
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    assert (tmp_path / "own.png").read_bytes() != (tmp_path / "budgeted.png").read_bytes()


def test_narrow_terminals_do_not_truncate_numbers(evaluation: Evaluation) -> None:
    compared = evaluation.comparison.policies[0]
    wide = replace(compared.mean_lead, mean=0.1234, error=0.5678)
    policies = tuple(
        replace(policy, policy=Policy("probability_margin", policy.policy.family), crossfit_lead=0.4321)
        for policy in evaluation.policies[:3]
    )
    rows = tuple(replace(compared, policy=result.policy, mean_lead=wide) for result in policies)
    comparison = replace(evaluation.comparison, policies=rows)
    shown = io.StringIO()
    print_evaluation(
        replace(evaluation, policy=policies[0].policy, policies=policies, comparison=comparison),
        Console(file=shown, width=80),
    )
    table = shown.getvalue().partition("worst of")[2]
    assert "…" not in shown.getvalue()
    assert table.count("56.78") == table.count("+43.21") == 3


def test_published_costs_are_those_of_the_published_network() -> None:
    with torch.device("meta"):
        network = MSDNet(CONFIGS["C-any"])
    ours = [ops / 1e6 for ops in measure_cost(network, 32).published]
    for curve in CIFAR100_ANYTIME:
        assert ours == pytest.approx(list(curve.mflops), rel=1e-3)
    for curve in (*CIFAR100_ANYTIME, *CIFAR100_BUDGETED):
        assert len(curve.mflops) == len(curve.accuracy)
        assert list(curve.mflops) == sorted(curve.mflops)
        assert all(0.6 < accuracy < 0.8 for accuracy in curve.accuracy)
        assert "published" in curve.label
        assert curve.source
