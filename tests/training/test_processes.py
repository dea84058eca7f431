"""Training in two processes, started from the command line."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.training import tiny
from tests.training.commands import PATIENCE_S, start
from training.averaging import Averaging
from training.checkpoint import RunError, RunFolder
from training.data import load_image_set
from training.image_set import ImageSet
from training.launching import LAUNCHER, LOST_ANOTHER, TELLING_S, launch
from training.loop import Trainer
from training.processes import Processes, end_if_lost
from training.recipe import Recipe

CPU = torch.device("cpu")


def train_as_two(recipe: Recipe, images: ImageSet, folder: Path) -> tuple[list[Trainer], torch.Tensor]:
    """Compute in this process what two should: gradients on their own rows, then the same step with the mean gradient.

    Returns both trainers, and the mean of the statistics in the last epoch.

    This differs from one batch of all rows: each process normalises by the statistics of its own rows, and the running
    statistics are averaged after every epoch.
    """
    pair = [Trainer(recipe, images, RunFolder(folder / f"rank {rank}"), 0, Processes(0, 1, CPU)) for rank in (0, 1)]
    for rank, one in enumerate(pair):
        one.processes = one.batches.processes = Processes(rank, 2, CPU)
        one.optimiser.step = one.averaging.update = lambda: None  # type: ignore[assignment,method-assign]
    statistics: list[torch.Tensor] = []
    for step in range(pair[0].total_steps):
        statistics += [one._step(step)[0] for one in pair]
        for both in zip(*(one.network.parameters() for one in pair), strict=True):
            if both[0].grad is None:  # no exit reads it
                continue
            mean = sum(parameter.grad for parameter in both) / 2  # type: ignore[misc]
            for parameter in both:
                parameter.grad = mean.clone()  # type: ignore[union-attr]
        for one in pair:
            torch.optim.SGD.step(one.optimiser)
            Averaging.update(one.averaging)
        if (step + 1) % pair[0].steps_per_epoch == 0:
            networks_of = [
                dict.fromkeys((one.network, one.averaging.evaluated)) for one in pair
            ]  # may be the same network
            for networks in zip(*networks_of, strict=True):
                for both in zip(*(network.buffers() for network in networks), strict=True):
                    mean = torch.stack(both).double().mean(0)
                    for buffer in both:
                        buffer.copy_(mean)
    for one in pair:
        one.processes = Processes(0, 1, CPU)
    n_last = 2 * pair[0].steps_per_epoch  # the statistics of both in the last epoch
    return pair, torch.stack(statistics[-n_last:]).mean(0)


@pytest.mark.parametrize(
    "settings",
    [
        ["objective.learned_temperatures=true", "objective.gates=0.3"],
        ["objective.final_temperatures=[0.1]", "optimisation.ema_decay=0.8", "network.arguments.n_blocks=3"],
    ],
    ids=["learned t, gates, weights that no exit reads", "scheduled t, averaged, all weights read"],
)
def test_two_processes_take_the_mean_of_their_steps(tmp_path: Path, settings: list[str]) -> None:
    data, recipe = tiny.write_folder(tmp_path / "cifar"), tiny.write_recipe(tmp_path / "tiny.toml")
    train = ("train", tmp_path / "two", "--recipe", recipe, "--data", data, "--processes", 2, "--device", "cpu")
    told = start(*train, *(f"--set={setting}" for setting in settings))
    _, err = told.communicate(timeout=PATIENCE_S)
    assert told.returncode == 0, err
    assert err == ""

    (one, other), statistics = train_as_two(Recipe.load(str(recipe), settings), load_image_set(data), tmp_path)
    state = RunFolder(tmp_path / "two").load_checkpoint()
    networks = {"network": one.averaging.evaluated, "trained": one.network}
    for part in networks.keys() & state.keys():
        expected = networks[part].state_dict()
        assert state[part].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(state[part][name], value, rtol=1e-4, atol=1e-5), f"{part} {name}"
    assert state["progress"]["temperatures"] == one.progress.temperatures == other.progress.temperatures
    assert ("trained" in state) == bool(one.recipe.optimisation.ema_decay)
    logged = RunFolder(tmp_path / "two").read_log()[-1]
    assert logged["losses"] == pytest.approx(statistics[0].tolist(), abs=1e-3)
    # Rounding may move an image across a border: 1 of 64 in the last epoch, or 1 of the 40 that are held out.
    assert logged["valid_shares"] == pytest.approx(statistics[1].tolist(), abs=0.02)
    assert logged["held_out_accuracy"] == pytest.approx(one.held_out_accuracy(), abs=0.03)


def test_sigterm_saves_both_processes_and_the_same_command_resumes(tmp_path: Path) -> None:
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


def run_instead(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launched processes run a shell script in place of Python."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))


@pytest.mark.parametrize(
    ("ignored", "numbers", "status"),
    [
        ("INT", [signal.SIGINT], 130),  # as processes do that swallow KeyboardInterrupt while they import
        ("INT", [signal.SIGTERM], 143),
        ("INT TERM", [signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_processes_that_do_not_train_yet_are_ended_without_a_message(
    ignored: str,
    numbers: list[int],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_instead(f"trap '' {ignored}; touch {tmp_path}/$RANK; exec sleep 20", tmp_path, monkeypatch)

    def stop() -> None:
        while not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # two signals at once would be one

    threading.Thread(target=stop, daemon=True).start()
    assert launch(2, ["train"]) == status
    assert capfd.readouterr().err == ""


def test_bad_input_to_two_processes_is_reported_once(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "tiny.toml")
    told = start("train", tmp_path / "run", "--recipe", recipe, "--data", tmp_path / "nowhere", "--processes", 2)
    _, err = told.communicate(timeout=PATIENCE_S)
    assert told.returncode == 2
    assert err.count("error:") == 1
    assert "no such file or folder" in err
    assert "Traceback" not in err


def test_an_error_is_reported_by_the_first_process_even_if_others_exit_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ $RANK = 0 ] || exit 2\nsleep 0.5; echo "error: told" >&2; exit 2\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert launch(2, ["train"]) == 2
    assert capfd.readouterr().err == "error: told\n"


def test_when_one_process_crashes_the_others_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n[ $RANK = 0 ] || exit 1\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert launch(2, ["train"]) == 1


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("[ $RANK = 0 ] || kill -9 $$; exec sleep 600", 9, r"process 1 was killed by signal 9 \(out of memory"),
        ("[ $RANK = 0 ] || kill -9 $$; trap 'exit 3' TERM; sleep 600 & wait", 9, "process 1 was killed by signal 9"),
        ("exit 3", 3, "the processes lost contact with each other"),
        ("[ $RANK = 0 ] || exit 3; sleep 0.5; echo 'error: told' >&2; exit 2", 2, None),
        (
            "[ $RANK = 0 ] && exit 3; exit 2",
            2,
            "process 1 failed on an error that process 0 did not hit.*--processes 1",
        ),
        ("[ $RANK = 0 ] || exec sleep 600; echo 'error: told' >&2; exit 2", 2, None),
        ('[ "$EXITSERVE_LAUNCHER" = $PPID ]', 0, None),
    ],
)
def test_the_launcher_reports_failures_that_processes_cannot(
    script: str,
    status: int,
    told: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_instead(script, tmp_path, monkeypatch)
    began = time.monotonic()
    assert launch(2, ["train"]) == status
    assert time.monotonic() - began < TELLING_S / 2  # it does not wait for a process that has reported
    errors = [line for line in capfd.readouterr().err.splitlines() if line != "error: told"]
    assert len(errors) == (told is not None)
    assert told is None or re.match(f"error: {told}", errors[0])


def test_a_process_that_loses_another_exits_silently_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.delenv(LAUNCHER, raising=False)
    lost = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    end_if_lost(lost)
    monkeypatch.setenv(LAUNCHER, "1")
    end_if_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert ended == []
    end_if_lost(lost)
    assert ended == [LOST_ANOTHER]


def test_processes_save_and_stop_when_their_launcher_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_image_set(tiny.write_folder(tmp_path / "cifar"))
    run = RunFolder(tmp_path / "run")
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))  # not the parent of this process
    assert Trainer(tiny.recipe(), images, run, 0, Processes(0, 1, CPU)).train() == "signal"
    assert run.load_checkpoint()["progress"]["step"] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_detects_too_few_gpus(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="2 processes need one GPU each, but torch sees 1: --processes 1"):
        Processes.join("cuda")


def test_launching_restores_the_signal_handlers() -> None:
    """A study calibrates after training, and Ctrl-C and SIGTERM must end that, too."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    assert launch(1, ["train", "--help"]) == 0
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("n_rows", [16, 17, 3])
def test_shares_of_a_batch_are_equal_and_disjoint(n_rows: int) -> None:
    rows = torch.randperm(n_rows)
    shares = [Processes(rank, 3, CPU).share(rows) for rank in range(3)]
    assert {len(share) for share in shares} == {n_rows // 3}
    assert torch.cat(shares).tolist() == rows[: 3 * (n_rows // 3)].tolist()
