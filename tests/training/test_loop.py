import json
import signal
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training import tiny
from training.augment import DeviceImages
from training.calibration import load_trained
from training.checkpoint import RunFolder
from training.image_set import ImageSet, Split
from training.loop import Trainer
from training.processes import Processes
from training.recipe import Recipe
from training.schedule import learning_rate

ALONE = Processes(0, 1, torch.device("cpu"))
STEPS_PER_EPOCH = 4  # 64 images, 16 rows


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return tiny.image_set(tmp_path_factory.mktemp("data") / "cifar")


def trainer(path: Path, images: ImageSet, recipe: Recipe | None = None, seed: int = 0) -> Trainer:
    return Trainer(recipe or tiny.recipe(), images, RunFolder(path), seed, ALONE, "python -m training train RUN")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return RunFolder(path).load_checkpoint()["network"]


def numbers(path: Path) -> list[dict]:
    """The log without times and speeds."""
    return [
        {key: value for key, value in record.items() if key not in ("seconds", "images_per_s")}
        for record in RunFolder(path).read_log()
    ]


def held_out_accuracy(path: Path, images: ImageSet) -> list[float]:
    """Of the network in a run's checkpoint, as it would be served."""
    network, _ = load_trained(RunFolder(path), len(images.class_names))
    held_out = Split.load(RunFolder(path).split, len(images.train_labels)).held_out
    normal = (images.train_images[held_out] / 255.0 - np.array(images.mean)) / np.array(images.std)
    with torch.inference_mode():
        logits = network(torch.from_numpy(normal.transpose(0, 3, 1, 2).astype(np.float32)))
    return [round(float((x.argmax(1).numpy() == images.train_labels[held_out]).mean()), 4) for x in logits]


def assert_same_run(one: Path, other: Path) -> None:
    first, second = RunFolder(one).load_checkpoint(), RunFolder(other).load_checkpoint()
    assert first["progress"]["step"] == second["progress"]["step"]
    assert first["network"].keys() == second["network"].keys()
    assert all(torch.equal(first["network"][name], second["network"][name]) for name in first["network"])
    assert numbers(one) == numbers(other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_stopped_at_every_step_ends_like_an_uninterrupted_one(
    tmp_path: Path, images: ImageSet, precision: str
) -> None:
    recipe = tiny.recipe(numerics={"precision": precision}, optimisation={"schedule": "one_cycle"})
    assert trainer(tmp_path / "whole", images, recipe).train() == "finished"
    n_times = 0
    while trainer(tmp_path / "pieces", images, recipe).train(time_limit_s=0) == "time limit":
        n_times += 1
    assert n_times == 2 * STEPS_PER_EPOCH - 1
    assert [record["epoch"] for record in numbers(tmp_path / "whole")] == [1, 2]
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_a_run_killed_while_writing_its_log_resumes(tmp_path: Path, images: ImageSet) -> None:
    trainer(tmp_path / "whole", images).train()
    for _ in range(STEPS_PER_EPOCH + 1):
        run = trainer(tmp_path / "cut", images)
        run.train(time_limit_s=0)
    with run.folder.log.open("a") as log:
        log.write('{"epoch": 2, "losses": [0.')
    assert [record["epoch"] for record in run.folder.read_log()] == [1]
    trainer(tmp_path / "cut", images).train()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_the_loss_logged_is_the_mean_over_the_epoch_whether_resumed_or_not(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    step = Trainer._step

    def noted(self: Trainer, number: int) -> tuple[torch.Tensor, int]:
        statistics, n_rows = step(self, number)
        seen.append(statistics)
        return statistics, n_rows

    monkeypatch.setattr(Trainer, "_step", noted)
    trainer(tmp_path / "run", images).train(time_limit_s=0)
    trainer(tmp_path / "run", images).train()
    expected = [torch.stack(seen[i : i + STEPS_PER_EPOCH]).mean(0) for i in (0, STEPS_PER_EPOCH)]
    for record, (losses, valid_shares) in zip(numbers(tmp_path / "run"), expected, strict=True):
        assert record["losses"] == pytest.approx(losses.tolist(), abs=1e-4)
        assert record["valid_shares"] == pytest.approx(valid_shares.tolist(), abs=1e-4)


def test_averaged_weights_are_evaluated_and_saved(tmp_path: Path, images: ImageSet) -> None:
    recipe = tiny.recipe(optimisation={"ema_decay": 0.8})
    whole = trainer(tmp_path / "whole", images, recipe)
    expected = {name: value.clone() for name, value in whole.network.state_dict().items()}
    step = whole._step

    def noted(number: int) -> tuple[torch.Tensor, int]:
        done = step(number)
        first = number == 0  # the average starts from the weights after the first step
        for name, value in whole.network.state_dict().items():
            expected[name] = value.clone() if first else (0.8 * expected[name] + 0.2 * value).to(value.dtype)
        return done

    whole._step = noted  # type: ignore[method-assign]
    whole.train()
    kept = RunFolder(tmp_path / "whole").load_checkpoint()
    floats = [name for name, value in expected.items() if value.is_floating_point()]
    assert all(torch.allclose(kept["network"][name], expected[name], atol=1e-5) for name in floats)
    assert not all(torch.allclose(kept["trained"][name], expected[name], atol=1e-5) for name in floats)
    assert numbers(tmp_path / "whole")[-1]["held_out_accuracy"] == held_out_accuracy(tmp_path / "whole", images)

    while trainer(tmp_path / "pieces", images, recipe).train(time_limit_s=0) == "time limit":
        pass
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes(
    tmp_path: Path, images: ImageSet, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def interrupted(self: Trainer, at: int) -> tuple[torch.Tensor, int]:
        if at == 5:
            signal.raise_signal(number)
        return step(self, at)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted)
        assert trainer(tmp_path / "stopped", images).train() == "signal"
    assert signal.getsignal(number) is before
    assert RunFolder(tmp_path / "stopped").load_checkpoint()["progress"]["step"] == 6
    assert trainer(tmp_path / "stopped", images).train() == "finished"
    assert trainer(tmp_path / "whole", images).train() == "finished"
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_killed_between_log_and_checkpoint_logs_every_epoch_once(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Trainer._save

    def killed(self: Trainer) -> None:
        if self.progress.step == 2 * STEPS_PER_EPOCH:
            raise MemoryError("killed")
        save(self)

    recipe = tiny.recipe(optimisation={"epochs": 3})
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", killed)
        run = trainer(tmp_path / "killed", images, recipe)
        with pytest.raises(MemoryError):
            run.train()
    assert [record["epoch"] for record in numbers(tmp_path / "killed")] == [1, 2]
    trainer(tmp_path / "killed", images, recipe).train()
    trainer(tmp_path / "whole", images, recipe).train()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_training_learns(tmp_path: Path, images: ImageSet) -> None:
    recipe = tiny.recipe(optimisation={"epochs": 8, "schedule": "one_cycle"})
    trainer(tmp_path / "run", images, recipe).train()
    log = RunFolder(tmp_path / "run").read_log()
    assert all(later < first for first, later in zip(log[0]["losses"], log[-1]["losses"], strict=True))
    assert log[-1]["held_out_accuracy"][-1] > 0.6  # of 4 classes that differ in colour


def test_every_step_updates_the_batch_statistics_and_every_epoch_is_judged_by_them(
    tmp_path: Path, images: ImageSet
) -> None:
    run = trainer(tmp_path / "run", images)
    run.train()
    counts = {int(b) for name, b in run.network.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2 * STEPS_PER_EPOCH}
    assert numbers(tmp_path / "run")[-1]["held_out_accuracy"] == held_out_accuracy(tmp_path / "run", images)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_network_computes_in_the_recipes_precision(
    tmp_path: Path, images: ImageSet, precision: str, dtype: torch.dtype
) -> None:
    run, seen = trainer(tmp_path / "run", images, tiny.recipe(numerics={"precision": precision})), []
    run.network.heads[0].register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
    run._step(0)
    run.held_out_accuracy()
    assert seen == [dtype, dtype]


def test_every_step_is_taken_at_the_rate_of_the_schedule(tmp_path: Path, images: ImageSet) -> None:
    o = tiny.recipe(optimisation={"schedule": "one_cycle", "warmup_fraction": 0.5}).optimisation
    run = trainer(tmp_path / "run", images, tiny.recipe(optimisation=o.model_dump()))
    for step in (0, 3, 7):
        run._step(step)
        rates = [group["lr"] for group in run.optimiser.param_groups]
        assert rates == [learning_rate(o, step, STEPS_PER_EPOCH)]


def test_images_are_resized_as_the_run_goes_on(tmp_path: Path, images: ImageSet) -> None:
    sizes = {"crop_padding_px": 0, "crop_area": (0.5, 1.0), "sizes_px": [32, 40]}
    run = trainer(tmp_path / "run", images, tiny.recipe(augmentation=sizes))
    assert [run.batches[step][0].shape[-1] for step in range(run.total_steps)] == [32] * 4 + [40] * 4


def test_the_seed_decides_the_run(tmp_path: Path, images: ImageSet) -> None:
    recipe = tiny.recipe(optimisation={"epochs": 1})
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        trainer(tmp_path / name, images, recipe, seed).train()
    assert_same_run(tmp_path / "first", tmp_path / "again")
    first, other = weights(tmp_path / "first"), weights(tmp_path / "other")
    assert not torch.equal(first["stem.scales.0.0.weight"], other["stem.scales.0.0.weight"])


def test_the_seed_decides_order_and_augmentation_by_themselves(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if first weights and split are the same, as in runs that start from a bundle."""
    rows_seen, pixels_seen = [], []
    augmented = DeviceImages.augmented

    def noted(self: DeviceImages, rows: torch.Tensor, draws: torch.Generator, size_px: int | None) -> object:
        rows_seen.append(rows.tolist())
        pixels_seen.append(augmented(self, torch.arange(16), draws, size_px)[0])
        return augmented(self, rows, draws, size_px)

    monkeypatch.setattr(DeviceImages, "augmented", noted)
    for seed, rank, count, step in ((0, 0, 1, 5), (1, 0, 1, 5), (0, 0, 2, 5), (0, 1, 2, 5), (0, 0, 1, 1)):
        run = trainer(tmp_path / "run", images)
        run.batches.seed, run.batches.processes = seed, Processes(rank, count, ALONE.device)
        run._step(step)
    assert rows_seen[0] != rows_seen[1]
    assert rows_seen[0] == [*rows_seen[2], *rows_seen[3]]
    for one, other in combinations(pixels_seen, 2):  # and so do every process and every epoch
        assert not torch.equal(one, other)


def test_every_epoch_has_every_training_image_once_and_no_held_out_one(tmp_path: Path, images: ImageSet) -> None:
    run = trainer(tmp_path / "run", images)
    epochs = [
        torch.cat([run.batches.rows_of(step) for step in range(first, first + STEPS_PER_EPOCH)])
        for first in (0, STEPS_PER_EPOCH)
    ]
    assert not torch.equal(*epochs)
    for rows in epochs:
        assert rows.sort().values.tolist() == list(range(64))
    assert np.array_equal(run.train_images.labels, images.train_labels[run.split.train])
    assert not set(run.split.train) & set(run.split.held_out)


def test_the_description_records_how_the_run_was_made_without_paths(tmp_path: Path, images: ImageSet) -> None:
    run = trainer(tmp_path / "run", images, seed=7)
    text = (tmp_path / "run" / "run.json").read_text()
    described = json.loads(text)
    assert described["seed"] == 7
    assert described["recipe"]["optimisation"]["batch_rows"] == 16
    known = {"split_sha256": run.split.sha256, "images_sha256": images.sha256}
    assert described["data"] == {"name": "cifar100", "image_size_px": 32, **known}
    assert described["torch"] == torch.__version__
    assert str(tmp_path) not in text


def test_auto_precision_is_bf16_only_if_supported_and_kept_on_resume(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(numerics={"precision": "auto"})

    def precision(folder: str) -> str:
        begun = trainer(tmp_path / folder, images, recipe)
        begun.train(time_limit_s=0)
        return begun.precision

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert precision("old-cpu") == "fp32"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert precision("new-cpu") == "bf16"
    assert precision("old-cpu") == "fp32"
