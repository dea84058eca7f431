"""Training in two processes, started as a person starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.data import REPOSITORY
from tests.training import tiny
from training.checkpoint import RunFolder
from training.data import load_image_set
from training.loop import Trainer
from training.processes import Processes
from training.recipe import Recipe

CPU = torch.device("cpu")
PATIENCE_S = 120  # for a busy machine; it takes a few


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_take_the_mean_of_their_steps(tmp_path: Path) -> None:
    """One step of two processes of 8 rows each equals, in one process, the mean of both gradients.

    Not that of one batch of 16: each process normalises by the statistics of its own rows.
    """
    data, recipe = tiny.write_folder(tmp_path / "cifar"), tiny.write_recipe(tmp_path / "tiny.toml")
    train = ("train", tmp_path / "two", "--recipe", recipe, "--data", data, "--processes", 2, "--device", "cpu")
    told = start(*train, "--time-limit", 0)
    out, err = told.communicate(timeout=PATIENCE_S)
    assert told.returncode == 0, err
    assert "stopped by the time limit and saved at step 1 of 8" in out
    assert err == ""

    alone = RunFolder(tmp_path / "alone")
    one = Trainer(Recipe.load(str(recipe)), load_image_set(data), alone, 0, Processes(0, 1, CPU))
    first_weights = {name: value.clone() for name, value in one.network.state_dict().items()}
    gradients, statistics = [], []
    for rank in (0, 1):
        one.network.load_state_dict(first_weights)
        one.processes = Processes(rank, 2, CPU)
        one._step(0)
        gradients.append([p.grad.clone() for p in one.network.parameters() if p.grad is not None])
        statistics.append({name: value.clone() for name, value in one.network.named_buffers()})
    one.network.load_state_dict(first_weights)
    optimiser = torch.optim.SGD(one.network.parameters(), 0.1, 0.9, weight_decay=1e-4)
    for parameter, first, second in zip(one.network.parameters(), *gradients, strict=True):
        parameter.grad = (first + second) / 2
    optimiser.step()

    saved = RunFolder(tmp_path / "two").load_checkpoint()["network"]
    for name, parameter in one.network.named_parameters():
        assert torch.allclose(saved[name], parameter, atol=1e-6), name
    for name, value in statistics[0].items():
        mean = (value + statistics[1][name]) / 2 if value.is_floating_point() else value
        assert torch.allclose(saved[name], mean.to(value.dtype), atol=1e-6), name


def test_sigterm_saves_both_and_the_same_command_goes_on(tmp_path: Path) -> None:
    data, recipe = tiny.write_folder(tmp_path / "cifar"), tiny.write_recipe(tmp_path / "tiny.toml", epochs=100_000)
    run = RunFolder(tmp_path / "run")
    train = ("train", run.path, "--recipe", recipe, "--data", data, "--processes", 2, "--device", "cpu")
    running = start(*train)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not run.log.is_file() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=PATIENCE_S)
    finally:
        running.kill()
    assert running.returncode == 0, err
    assert "stopped by the signal and saved at step" in out
    assert err == ""
    step = run.load_checkpoint()["progress"]["step"]
    assert step >= 4

    again = start(*train, "--time-limit", 0)
    _, err = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, err
    assert run.load_checkpoint()["progress"]["step"] == step + 1


def test_bad_input_to_two_processes_is_told_once(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "tiny.toml")
    told = start("train", tmp_path / "run", "--recipe", recipe, "--data", tmp_path / "nowhere", "--processes", 2)
    _, err = told.communicate(timeout=PATIENCE_S)
    assert told.returncode == 2
    assert err.count("error:") == 1
    assert "no such file or folder" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("n_rows", [16, 17, 3])
def test_shares_of_a_batch_are_equal_and_disjoint(n_rows: int) -> None:
    rows = torch.randperm(n_rows)
    shares = [Processes(rank, 3, CPU).share(rows) for rank in range(3)]
    assert {len(share) for share in shares} == {n_rows // 3}
    assert torch.cat(shares).tolist() == rows[: 3 * (n_rows // 3)].tolist()
