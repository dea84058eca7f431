"""Only one command at a time trains in a run's folder."""

import os
from pathlib import Path

import pytest

from tests.training import tiny
from tests.training.test_command import command
from training.checkpoint import RunError
from training.locking import alone_in


def test_a_folder_is_locked_until_its_owner_leaves_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with alone_in(run):
        (run / "checkpoint.pt").touch()
        with pytest.raises(RunError, match=rf"another process trains here \(pid {os.getpid()}\)"), alone_in(run):
            pass
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(run):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        with alone_in(tmp_path / "run"):
            os._exit(0)
    os.waitpid(child, 0)
    with alone_in(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").read_text() == str(os.getpid())


def test_an_unused_folder_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="refused"), alone_in(tmp_path / "run"):
        raise RunError("refused")
    assert not (tmp_path / "run").exists()


def test_the_same_command_twice_is_refused_while_the_first_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, recipe = tiny.write_folder(tmp_path / "cifar-100-python"), tiny.write_recipe(tmp_path / "tiny.toml")
    with alone_in(tmp_path / "run"):
        assert command(monkeypatch, "train", tmp_path / "run", "--recipe", recipe, "--data", data) == 2
    assert "another process trains here" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
