"""Runs with the objective `weighted`: resumed, with averaged weights, in two processes, exported and served."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from models.bundle import WEIGHTS, load_bundle
from models.onnx_weights import load_stage_session
from tests.training import tiny
from tests.training.commands import PATIENCE_S, start
from training.calibration import ExitOutputs, calibrate, load_trained
from training.checkpoint import RunFolder
from training.data import load_image_set
from training.evaluation import cost_of, evaluate
from training.image_set import DataError, ImageSet
from training.loop import Trainer
from training.objectives import WeightedLosses, network_of
from training.packing import pack
from training.plots import plot_run
from training.processes import Processes
from training.recipe import Recipe
from training.unpacking import read_weights

# Modules that torch imports for forward mode use functions that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
STEPS = 8


def weighted(weighting: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
    objective = {"name": "weighted", "weighting": weighting or {}, **sections.pop("objective", {})}
    return tiny.recipe(objective=objective, **sections)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return tiny.image_set(tmp_path_factory.mktemp("data") / "cifar")


def trainer(path: Path, images: ImageSet, recipe: Recipe) -> Trainer:
    return Trainer(recipe, images, RunFolder(path), 0, ALONE, "python -m training train RUN")


def losses_of(run: Trainer) -> WeightedLosses:
    assert isinstance(run.loss_of, WeightedLosses)
    return run.loss_of


def tensors(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by path."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {place: tensor for key, value in items for place, tensor in tensors(value, f"{name}.{key}").items()}


@pytest.mark.parametrize(
    "recipe",
    [
        weighted(),
        weighted({"meta_interval": 3, "mean": "row"}, numerics={"precision": "bf16"}, optimisation={"nesterov": True}),
        weighted(
            {"mean": "mat"},
            objective={"label_smoothing": 0.1},
            augmentation={"cutmix": 0.5},
            optimisation={"ema_decay": 0.8},
        ),
    ],
    ids=["as published", "every third step, bf16, Nesterov", "smoothed, mixed, averaged"],
)
def test_a_run_stopped_at_every_step_ends_like_an_uninterrupted_one(
    tmp_path: Path, images: ImageSet, recipe: Recipe
) -> None:
    assert trainer(tmp_path / "whole", images, recipe).train() == "finished"
    n_times = 0
    while trainer(tmp_path / "pieces", images, recipe).train(time_limit_s=0) == "time limit":
        n_times += 1
    assert n_times == STEPS - 1
    whole, pieces = (tensors(RunFolder(tmp_path / name).load_checkpoint()) for name in ("whole", "pieces"))
    assert whole.keys() == pieces.keys()
    assert any(name.startswith(".predictor.") for name in whole)
    assert any(name.startswith(".predictor_optimiser.state.") for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, pieces[name]), name


def test_the_predictor_learns_at_its_interval_from_the_other_batch_of_the_pair(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[torch.Tensor, torch.Tensor]] = []
    try_step = WeightedLosses.try_step

    def noted(self: WeightedLosses, batch: Any, judge: Any, optimiser: torch.optim.SGD) -> None:
        tried.append((batch[0], judge[0]))
        try_step(self, batch, judge, optimiser)

    monkeypatch.setattr(WeightedLosses, "try_step", noted)
    run = trainer(tmp_path / "run", images, weighted({"meta_interval": 3}))
    changed = []
    for step in range(STEPS):
        before = [p.detach().clone() for p in losses_of(run).predictor.parameters()]
        run._step(step)
        after = losses_of(run).predictor.parameters()
        changed.append(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    assert changed == [True, False, False, True, False, False, True, False]
    for (batch, judge), (step, other) in zip(tried, [(0, 1), (3, 2), (6, 7)], strict=True):
        assert torch.equal(batch, run.batches[step][0])  # with the same augmentation as in the step
        assert torch.equal(judge, run.batches[other][0])


def test_every_batch_is_paired_with_another_of_its_epoch(tmp_path: Path, images: ImageSet) -> None:
    run = trainer(tmp_path / "run", images, weighted())
    assert [run.batches.partner(step) for step in range(STEPS)] == [1, 0, 3, 2, 5, 4, 7, 6]
    odd = trainer(tmp_path / "odd", images, weighted(optimisation={"batch_rows": 20}))
    assert odd.steps_per_epoch == 3
    assert [odd.batches.partner(step) for step in range(6)] == [1, 0, 1, 4, 3, 4]


def test_a_single_batch_per_epoch_is_refused(tmp_path: Path, images: ImageSet) -> None:
    with pytest.raises(DataError, match="batches an epoch"):
        trainer(tmp_path / "run", images, weighted(optimisation={"batch_rows": 64}))
    trainer(tmp_path / "joint", images, tiny.recipe(objective={"name": "joint"}, optimisation={"batch_rows": 64}))


def test_it_starts_like_joint_training_and_takes_other_steps(tmp_path: Path, images: ImageSet) -> None:
    joint, ours = (
        trainer(tmp_path / name, images, recipe)
        for name, recipe in (("joint", tiny.recipe(objective={"name": "joint"})), ("weighted", weighted()))
    )
    assert joint.network.state_dict().keys() == ours.network.state_dict().keys()
    for one, other in zip(joint.network.parameters(), ours.network.parameters(), strict=True):
        assert torch.equal(one, other)
    statistics = [run._step(0)[0] for run in (joint, ours)]
    assert torch.equal(*statistics)  # the same images, and unweighted losses
    assert not all(
        torch.equal(a, b) for a, b in zip(joint.network.parameters(), ours.network.parameters(), strict=True)
    )


def test_two_processes_train_one_predictor_with_mean_gradients(tmp_path: Path) -> None:
    data, recipe = tiny.write_folder(tmp_path / "cifar"), tiny.write_recipe(tmp_path / "tiny.toml", epochs=1)
    settings = ["objective.name='weighted'", "objective.weighting.learning_rate=0.01", "optimisation.momentum=0.0"]
    train = ("train", tmp_path / "two", "--recipe", recipe, "--data", data, "--processes", 2, "--device", "cpu")
    told = start(*train, *(f"--set={setting}" for setting in settings))
    _, err = told.communicate(timeout=PATIENCE_S)
    assert told.returncode == 0, err
    assert err == ""

    # Reference in one process: both ranks try their step; then predictors and networks step with mean gradients.
    loaded, images = Recipe.load(str(recipe), settings), load_image_set(data)
    pair = [Trainer(loaded, images, RunFolder(tmp_path / f"rank {rank}"), 0, ALONE) for rank in (0, 1)]
    for rank, one in enumerate(pair):
        one.processes = one.batches.processes = Processes(rank, 2, CPU)

    def mean_gradients(networks: list[torch.nn.Module]) -> None:
        for both in zip(*(network.parameters() for network in networks), strict=True):
            if both[0].grad is not None:
                mean = (both[0].grad + both[1].grad) / 2
                for parameter in both:
                    parameter.grad = mean.clone()

    for step in range(pair[0].total_steps):
        for one in pair:
            for group in one.optimiser.param_groups:
                group["lr"] = 0.05 * (1 + np.cos(np.pi * step / one.total_steps))
            losses_of(one).try_step(one.batches[step], one.batches[one.batches.partner(step)], one.optimiser)
        mean_gradients([losses_of(one).predictor for one in pair])
        for one in pair:
            losses_of(one).learn(step / one.total_steps, ALONE)
            one.optimiser.zero_grad()
            losses_of(one)(one.network.train(), *one.batches[step])[0].backward()
        mean_gradients([one.network for one in pair])
        for one in pair:
            one.optimiser.step()
    state = RunFolder(tmp_path / "two").load_checkpoint()
    first, second = (losses_of(one).predictor.state_dict() for one in pair)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.allclose(state["predictor"][name], value, rtol=1e-3, atol=1e-4), name
    parameters = dict(pair[0].network.named_parameters())
    for name, value in parameters.items():
        assert torch.allclose(state["network"][name], value, rtol=1e-3, atol=1e-4), name


def test_its_bundle_serves_the_network_without_the_predictor(tmp_path: Path, images: ImageSet) -> None:
    folder, bundle = RunFolder(tmp_path / "run"), tmp_path / "bundle"
    recipe = weighted(optimisation={"ema_decay": 0.5})
    trainer(folder.path, images, recipe).train()
    record = calibrate(folder, images, CPU)
    evaluation = evaluate(ExitOutputs.load(folder.heldout), ExitOutputs.load(folder.test), cost_of(folder, record))
    evaluation.save(folder, record)
    plot_run(folder, evaluation, record)
    pack(folder, bundle, "weighted")

    plain = network_of(tiny.recipe(objective={"name": "joint"}), len(tiny.CLASS_NAMES))
    assert read_weights(bundle / WEIGHTS).keys() == plain.state_dict().keys()
    for path in bundle.rglob("*"):
        assert path.is_dir() or b"predictor." not in path.read_bytes(), path.name
    card = (bundle / "README.md").read_text()
    assert "L2W-DEN" in card
    assert "Boosted training" not in card
    assert json.loads((bundle / "manifest.json").read_text())["training"]["recipe"]["objective"]["name"] == "weighted"

    network = load_trained(folder, len(tiny.CLASS_NAMES))[0].eval()
    manifest = load_bundle(bundle).manifest
    pixels = images.test_images[:6]
    state = {manifest.stages[0].inputs[0].name: pixels}
    scale, shift = np.array(images.std), np.array(images.mean)
    normalised = torch.from_numpy(((pixels / 255 - shift) / scale).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        heads = [x.numpy() for x in network(normalised)]
    ensembled = np.zeros_like(heads[0])
    for stage, plain_logits, t, s in zip(
        manifest.stages, heads, manifest.temperatures, manifest.arguments["head_scales"], strict=True
    ):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = load_stage_session(bundle, stage.file, session_options=options)
        values = session.run(None, {value.name: state[value.name] for value in stage.inputs})
        state.update(zip((value.name for value in stage.outputs), values, strict=True))
        ensembled = t * ensembled + s * plain_logits
        assert np.allclose(values[0], ensembled, atol=1e-4)
