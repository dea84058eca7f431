"""Runs that are refused or stop themselves, before any damage, with a one-line reason."""

import json
from pathlib import Path

import pytest
import torch

from tests.training import tiny
from tests.training.test_loop import STEPS_PER_EPOCH, numbers, trainer
from training.checkpoint import RunError, RunFolder
from training.image_set import DataError, ImageSet
from training.loop import Trainer
from training.objectives import check_image_size, network_of
from training.recipe import Recipe, RecipeError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return tiny.image_set(tmp_path_factory.mktemp("data") / "cifar")


@pytest.mark.parametrize(
    "what",
    [
        r"recipe \(network\.arguments\.base: 1, here 2; optimisation\.learning_rate: 0\.1, here 0\.2\)",
        "seed",
        "number of processes",
        "image set",
        "--image-size",
        "list of training images",
    ],
)
def test_a_folder_with_another_run_is_refused(tmp_path: Path, images: ImageSet, what: str) -> None:
    trainer(tmp_path / "run", images).train(time_limit_s=0)
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    described["processes"] += what == "number of processes"
    described["data"]["name"] += "x" * (what == "image set")
    described["data"]["image_size_px"] += what == "--image-size"
    described["data"]["images_sha256"] += "x" * (what == "list of training images")
    (tmp_path / "run" / "run.json").write_text(json.dumps(described))
    arguments = {**tiny.recipe().network.arguments, "base": 2}
    changed = tiny.recipe(optimisation={"learning_rate": 0.2}, network={"arguments": arguments})
    recipe = changed if what.startswith("recipe") else None
    with pytest.raises(RunError, match=f"holds a run with another {what}; .*another folder"):
        trainer(tmp_path / "run", images, recipe, seed=int(what == "seed"))


def test_another_description_does_not_make_another_recipe(tmp_path: Path, images: ImageSet) -> None:
    trainer(tmp_path / "run", images).train(time_limit_s=0)
    recipe = tiny.recipe().model_copy(update={"description": "said better"})
    assert trainer(tmp_path / "run", images, recipe).train() == "finished"


def test_a_nan_loss_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def lost(self: Trainer, number: int) -> tuple[torch.Tensor, int]:
        statistics, n_rows = step(self, number)
        return statistics * (float("nan") if number == STEPS_PER_EPOCH + 1 else 1.0), n_rows

    monkeypatch.setattr(Trainer, "_step", lost)
    with pytest.raises(RunError, match=r"at step 8 of 8 .* the last checkpoint is kept.*learning_rate=0\.033"):
        trainer(tmp_path / "run", images).train()
    assert RunFolder(tmp_path / "run").load_checkpoint()["progress"]["step"] == STEPS_PER_EPOCH
    assert [record["epoch"] for record in numbers(tmp_path / "run")] == [1]


def test_nan_weights_are_not_saved(tmp_path: Path, images: ImageSet) -> None:
    """The last step of an epoch may produce them, after its loss was computed."""
    run = trainer(tmp_path / "run", images)
    step = run.optimiser.step

    def lost(*_: object) -> None:
        step()
        if run.progress.step == STEPS_PER_EPOCH - 1:
            next(run.network.parameters()).data.fill_(torch.inf)

    run.optimiser.step = lost  # type: ignore[assignment,method-assign]
    with pytest.raises(RunError, match=r"at step 4 of 8 .* nothing was saved"):
        run.train()
    assert not run.folder.checkpoint.exists()


def test_a_diverging_learning_rate_is_reported(tmp_path: Path, images: ImageSet) -> None:
    with pytest.raises(RunError, match="no longer finite"):
        trainer(tmp_path / "run", images, tiny.recipe(optimisation={"learning_rate": 1e30})).train()


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path, images: ImageSet) -> None:
    trainer(tmp_path / "run", images).train()
    (tmp_path / "run" / "checkpoint.pt").unlink()
    of_the_run_before = [tmp_path / "run" / name for name in ("calibration.json", "results.json", "head_inputs.pt")]
    for path in of_the_run_before:
        path.touch()
    trainer(tmp_path / "run", images, seed=1).train()
    assert not any(path.exists() for path in of_the_run_before)
    assert [record["epoch"] for record in numbers(tmp_path / "run")] == [1, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == 1


def test_a_damaged_checkpoint_is_reported(tmp_path: Path, images: ImageSet) -> None:
    trainer(tmp_path / "run", images).train(time_limit_s=0)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint\.pt: can't be read"):
        trainer(tmp_path / "run", images)


def test_a_checkpoint_of_unknown_origin_is_not_resumed(tmp_path: Path, images: ImageSet) -> None:
    trainer(tmp_path / "run", images).train(time_limit_s=0)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(RunError, match=r"has a checkpoint\.pt, but no run\.json .*; restore that, or give another"):
        trainer(tmp_path / "run", images)


@pytest.mark.parametrize("state", [{}, [1], {"network": {}, "optimiser": {}}])
def test_a_file_that_is_no_checkpoint_is_reported(tmp_path: Path, images: ImageSet, state: object) -> None:
    """Such as weights alone, saved by another program."""
    trainer(tmp_path / "run", images).train(time_limit_s=0)
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(RunError, match=r"checkpoint\.pt: not a checkpoint of `python -m training`; restore"):
        trainer(tmp_path / "run", images)


@pytest.mark.parametrize("line", [b"\0\xff\0\n", b"{}\n", b"7\n"])
def test_a_damaged_log_is_reported_and_may_be_removed(tmp_path: Path, images: ImageSet, line: bytes) -> None:
    """A power cut may leave zeros in a file that was being written."""
    trainer(tmp_path / "run", images, tiny.recipe(optimisation={"epochs": 1})).train()
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes() + line)
    with pytest.raises(RunError, match=r"log\.jsonl: line 2 is damaged; remove that line"):
        trainer(tmp_path / "run", images, tiny.recipe(optimisation={"epochs": 1})).train()
    log.unlink()
    assert trainer(tmp_path / "run", images, tiny.recipe(optimisation={"epochs": 1})).train() == "finished"


def test_contradictory_options_are_refused_before_training(tmp_path: Path, images: ImageSet) -> None:
    with pytest.raises(DataError, match="cannot hold out 104 of 104 training images: choose from 2 to 103"):
        trainer(tmp_path / "a", images, Recipe.model_validate({**tiny.recipe().model_dump(), "held_out_images": 104}))
    with pytest.raises(DataError, match="don't go together"):
        trainer(tmp_path / "b", images, tiny.recipe(optimisation={"batch_rows": 1000}))
    with pytest.raises(RecipeError, match=r"but 160, 192, .*, 384 \(--image-size.*--recipe cifar100-f"):
        trainer(tmp_path / "c", images, Recipe.load("image-folder"))
    with pytest.raises(RecipeError, match=r"64 x 64 px, but 32 \(--image-size\).*--recipe image-folder is for photo"):
        check_image_size(network_of(tiny.recipe(), 4), 64)
