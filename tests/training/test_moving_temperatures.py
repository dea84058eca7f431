"""Learned or scheduled temperatures: training, resuming, and bundles with their values as numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training import tiny
from training.calibration import CalibrationRecord, ExitOutputs, calibrate, load_trained
from training.checkpoint import RunFolder
from training.evaluation import cost_of, evaluate
from training.image_set import ImageSet
from training.loop import Trainer
from training.objectives import boosting_of, temperatures_at
from training.packing import pack
from training.plots import plot_run
from training.processes import Processes
from training.recipe import Recipe, RecipeError
from training.unpacking import unpack

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
STEPS = 8
LEARNED = tiny.recipe(objective={"learned_temperatures": True})
SCHEDULED = tiny.recipe(objective={"temperatures": [0.8], "final_temperatures": [0.4, 0.1]})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return tiny.image_set(tmp_path_factory.mktemp("data") / "cifar")


def trainer(path: Path, images: ImageSet, recipe: Recipe) -> Trainer:
    return Trainer(recipe, images, RunFolder(path), 0, ALONE, "python -m training train RUN")


@pytest.mark.parametrize("recipe", [LEARNED, SCHEDULED], ids=["learned", "scheduled"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_a_run_stopped_at_every_step_ends_like_an_uninterrupted_one(
    tmp_path: Path, images: ImageSet, recipe: Recipe, ema_decay: float
) -> None:
    recipe = recipe.model_copy(update={"optimisation": recipe.optimisation.model_copy(update={"ema_decay": ema_decay})})
    assert trainer(tmp_path / "whole", images, recipe).train() == "finished"
    while trainer(tmp_path / "pieces", images, recipe).train(time_limit_s=0) == "time limit":
        pass
    whole, pieces = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "pieces")
    states = whole.load_checkpoint(), pieces.load_checkpoint()
    assert all(torch.equal(states[0]["network"][name], value) for name, value in states[1]["network"].items())
    logged = [[record["temperatures"] for record in run.read_log()] for run in (whole, pieces)]
    assert logged[0] == logged[1]
    assert load_trained(pieces, 4)[0].boosting.temperatures == pytest.approx(logged[0][-1], abs=1e-4)


def test_learned_temperatures_move_without_weight_decay(tmp_path: Path, images: ImageSet) -> None:
    run = trainer(tmp_path / "run", images, LEARNED)
    groups = run.optimiser.param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups][1:] == [(1, 0.0)]
    assert groups[1]["params"][0] is boosting_of(run.network).log_odds
    assert groups[0]["weight_decay"] == LEARNED.optimisation.weight_decay
    run.train()
    assert all(abs(t - 0.5) > 1e-4 for t in boosting_of(run.network).temperatures[1:])


def test_a_schedule_is_linear_from_first_to_final_values(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = trainer(tmp_path / "run", images, SCHEDULED), []
    monkeypatch.setattr(type(run.loss_of), "before", lambda *_: seen.append(boosting_of(run.network).temperatures))
    run.train()
    assert seen[0] == pytest.approx((0.8, 0.8))
    assert seen[-1] == pytest.approx((0.4, 0.1))
    assert np.allclose(np.diff(seen, axis=0), np.diff(seen, axis=0)[0])
    assert len(seen) == STEPS


def test_a_stopped_run_is_loaded_with_its_current_temperatures(tmp_path: Path, images: ImageSet) -> None:
    trainer(tmp_path / "run", images, SCHEDULED).train(time_limit_s=0)  # one step
    record = calibrate(RunFolder(tmp_path / "run"), images, CPU, refit=False)
    assert record.temperatures == pytest.approx((0.8, 0.8))


def test_a_bundle_stores_temperatures_as_numbers_and_recreates_the_run(tmp_path: Path, images: ImageSet) -> None:
    folder, bundle = RunFolder(tmp_path / "run"), tmp_path / "bundle"
    trainer(folder.path, images, LEARNED).train()
    record = calibrate(folder, images, CPU, refit=False)
    evaluation = evaluate(ExitOutputs.load(folder.heldout), ExitOutputs.load(folder.test), cost_of(folder, record))
    evaluation.save(folder, record)
    plot_run(folder, evaluation, record)
    pack(folder, bundle, "moved")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["temperatures"] == manifest["arguments"]["temperatures"] == list(record.temperatures)
    assert LEARNED.objective.temperatures != list(record.temperatures)
    assert f"{record.temperatures[-1]:.2f} from exit 2 on" in (bundle / "README.md").read_text()

    again = RunFolder(tmp_path / "again")
    unpack(bundle, again, images)
    assert calibrate(again, images, CPU, refit=False).temperatures == pytest.approx(record.temperatures)
    assert np.allclose(
        ExitOutputs.load(again.test).scores["logit_margin"],
        ExitOutputs.load(folder.test).scores["logit_margin"],
        atol=1e-4,
    )
    calibrate(again, images, CPU)  # and refitted like any run
    assert CalibrationRecord.load(again).ensemble is not None


def test_without_a_schedule_temperatures_are_constant() -> None:
    assert temperatures_at(tiny.recipe().objective, 2, 0.5) is None


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "joint", "learned_temperatures": True}, "joint is t = 0"),
        ({"learned_temperatures": True, "final_temperatures": [0.1]}, "not both"),
    ],
)
def test_contradictory_settings_are_refused(objective: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.recipe(objective=objective)


def test_learning_from_zero_is_refused(tmp_path: Path, images: ImageSet) -> None:
    recipe = tiny.recipe(objective={"learned_temperatures": True, "temperatures": [0.0]})
    with pytest.raises(RecipeError, match=r"objective\.temperatures: .* between 0 and 1"):
        trainer(tmp_path / "run", images, recipe)


def test_a_wrong_number_of_final_temperatures_is_refused_before_training(tmp_path: Path, images: ImageSet) -> None:
    recipe = tiny.recipe(objective={"final_temperatures": [0.1, 0.2, 0.3]})
    with pytest.raises(RecipeError, match=r"objective\.final_temperatures: 3 temperatures for 2 exits"):
        trainer(tmp_path / "run", images, recipe)
