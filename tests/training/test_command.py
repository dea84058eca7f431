"""The four steps from the command line."""

import json
import resource
import sys
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import onnxruntime as ort
import pytest
import torch

from models.bundle import load_bundle
from models.onnx_weights import load_stage_session
from models.scores import plain_scores, score_exits
from tests.training import tiny
from training.__main__ import run_command
from training.checkpoint import RunError, RunFolder
from training.image_set import Split
from training.packing import bundle_name
from training.predicting import FITTED


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `python -m training` in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command()
    return int(ended.value.code or 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny.write_folder(tmp_path / "data" / "cifar-100-python")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny.write_recipe(tmp_path / "tiny.toml")


@pytest.fixture(autouse=True)
def no_data_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXITSERVE_DATA", raising=False)


def test_help_describes_the_four_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--help") == 0
    told = capsys.readouterr().out
    positions = [told.index(f"{n}. python -m training {step}") for n, step in enumerate(STEPS, start=1)]
    assert positions == sorted(positions)
    assert "--data DATA" in told


STEPS = ("train", "calibrate", "evaluate", "export")


def test_from_images_to_a_bundle(
    tmp_path: Path, data: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "runs" / "first", tmp_path / "zoo" / "tiny-net"

    train = ("train", run, "--recipe", recipe, "--data", data, "--device", "cpu")
    assert command(monkeypatch, *train, "--time-limit", 0) == 0
    assert "give the same command again to resume" in capsys.readouterr().out
    assert command(monkeypatch, *train) == 0
    told = capsys.readouterr().out
    assert f"{run}: 64 training and 40 held-out images of 4 classes at 32 px; 2 epochs of 4 steps of 16 rows" in told
    assert "epoch 1 of 2" in told
    assert f"next: python -m training calibrate {run}" in told

    assert command(monkeypatch, "calibrate", run, "--data", data, "--device", "cpu") == 0
    assert "40 held-out images, read 60 test images" in capsys.readouterr().out

    assert command(monkeypatch, "evaluate", run) == 0
    told = capsys.readouterr().out
    assert "Every image at one exit" in told
    assert "chosen" in told
    for name in (
        "results.json",
        "anytime.csv",
        "budgeted.csv",
        "policies.csv",
        "policies.png",
        "anytime.png",
        "budgeted.png",
        "frontier.png",
    ):
        assert (run / name).stat().st_size > 0
    assert (run / "training.png").is_file()

    mine = tmp_path / "letters" / "dear.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert command(monkeypatch, "export", run, "--output", mine.parent) == 2
    assert "contains something other than a bundle" in capsys.readouterr().err
    assert mine.read_text() == "mine"

    assert command(monkeypatch, "export", run, "--output", output) == 0
    bundle = load_bundle(output)
    manifest = bundle.manifest
    assert (manifest.name, manifest.description) == ("tiny-net", "tiny")
    assert manifest.class_names == tiny.CLASS_NAMES
    results = json.loads((run / "results.json").read_text())
    assert (manifest.score, manifest.family) == (results["policy"]["score"], results["policy"]["family"])
    assert (manifest.predictor is not None) == (manifest.score in FITTED)
    assert [e.test_accuracy for e in manifest.exits] == [e["test_accuracy"] for e in results["exits"]]
    assert manifest.training["command"] == "python -m training train RUN --recipe tiny.toml --data DATA --seed 0"
    assert manifest.training["epochs"] == 2
    assert manifest.temperatures == manifest.arguments["temperatures"] != [0.5] * 2  # fitted to the held-out images
    split = Split.load(run / "split.npz", tiny.N_TRAIN)
    assert manifest.data.split_sha256 == split.sha256

    # The exported stages give the held-out images the scores and answers of the calibration.
    images, _ = tiny.coloured(tiny.N_TRAIN, 1)
    state = {manifest.stages[0].inputs[0].name: images[split.held_out]}
    logits = []
    for stage in manifest.stages:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = load_stage_session(output, stage.file, session_options=options)
        values = session.run(None, {value.name: state[value.name] for value in stage.inputs})
        state.update(zip((value.name for value in stage.outputs), values, strict=True))
        logits.append(values[0])
    for name, score in plain_scores(len(logits)).items():
        assert np.allclose(score_exits(score, logits), bundle.calibration.scores[name], atol=1e-3)
    assert np.isfinite(score_exits(bundle.score(), logits)).all()

    card = (output / "README.md").read_text()
    for result in results["exits"]:
        shown = [result["published_mflops"], result["executed_mflops"]]
        shown += [100 * result["test_accuracy"], 100 * result["test_top5_accuracy"]]
        assert f"\n| {result['exit']} | {' | '.join(f'{number:.2f}' for number in shown)} | " in card
    [chosen] = [result for result in results["policies"] if result["policy"] == results["policy"]]
    cheapest = chosen["points"][0]
    shown = [cheapest["budget_mflops"], cheapest["test_executed_mflops"], 100 * cheapest["test_accuracy"]]
    assert f"\n| {' | '.join(f'{number:.2f}' for number in shown)} | 100 0 |" in card
    assert "Krizhevsky" in card
    assert "Partly trained" not in card
    assert "2 epochs on 64 images in 0." in card  # not in 0.0 hours
    assert " minutes on " in card
    # No exported file contains paths of this machine.
    for path in output.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()

    # A second export replaces the bundle with the same files, except for the given texts.
    texts = ("--description", "Colours", "--images", "Noise.")
    assert command(monkeypatch, "export", run, "--output", output, *texts) == 0
    again = load_bundle(output).manifest
    assert again.description == "Colours"
    assert again.stages == manifest.stages
    assert {file for file in again.files if again.files[file] != manifest.files[file]} == {"README.md"}
    card = (output / "README.md").read_text()
    assert "\nColours.\n" in card
    assert "\nNoise.\n" in card


def test_the_recorded_command_reads_images_at_the_same_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data, run = (
        tiny.write_recipe(tmp_path / "my tiny.toml"),
        tiny.write_images(tmp_path / "own"),
        tmp_path / "r",
    )
    train = ("train", run, "--recipe", recipe, "--data", data, "--time-limit", 0)
    assert command(monkeypatch, *train, "--image-size", 32) == 0
    kept = json.loads((run / "run.json").read_text())["command"]
    assert kept == "python -m training train RUN --recipe 'my tiny.toml' --data DATA --seed 0 --image-size 32"


def test_a_partly_trained_network_says_so(
    tmp_path: Path, data: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my run"
    command(monkeypatch, "train", run, "--recipe", recipe, "--data", data, "--time-limit", 0)
    assert command(monkeypatch, "calibrate", run, "--data", data) == 0
    told = capsys.readouterr().out
    assert "trained for 0.25 of 2 epochs so far" in told
    assert f"next: python -m training evaluate '{run}'\n" in told


@pytest.mark.parametrize(
    ("name", "folder", "expected"),
    [
        (None, "tiny-net", "tiny-net"),
        (None, "My Net (2)", "My-Net-2"),
        (None, ".hidden", "hidden"),
        (None, "сеть", "network"),
        ("v1.2+a_b", "My Net", "v1.2+a_b"),
    ],
)
def test_a_bundle_is_named_after_its_folder_by_default(
    name: str | None, folder: str, expected: str, tmp_path: Path
) -> None:
    assert bundle_name(name, tmp_path / folder) == expected


@pytest.mark.parametrize("name", ["", "My Net", ".hidden", "a/b", "сеть"])
def test_an_invalid_bundle_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--name .*: give letters, digits and"):
        bundle_name(name, tmp_path)


def test_steps_out_of_order_name_the_missing_step(
    tmp_path: Path, data: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def refused(*arguments: object) -> str:
        assert command(monkeypatch, *arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert "Traceback" not in told
        return told

    steps = (("calibrate", run, "--data", data), ("evaluate", run), ("export", run, "--output", tmp_path / "bundle"))
    for step in steps:
        assert "python -m training train" in refused(*step)
    command(monkeypatch, "train", run, "--recipe", recipe, "--data", data)
    for step in steps[1:]:
        assert "python -m training calibrate" in refused(*step)
    command(monkeypatch, "calibrate", run, "--data", data)
    assert "python -m training evaluate" in refused(*steps[2])
    (run / "heldout.npz").unlink()
    assert "python -m training calibrate" in refused(*steps[1])
    assert not (tmp_path / "bundle").exists()


def test_bad_input_gives_a_one_line_error_and_status_2(
    tmp_path: Path, data: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    cases = [
        (("train", run, "--data", data, "--recipe", "nosuch"), "no recipe 'nosuch'"),
        (("train", run, "--data", tmp_path / "nowhere", "--recipe", recipe), "no such file or folder"),
        (("train", run, "--recipe", recipe), "--data"),
        (("train", run, "--data", data, "--recipe", recipe, "--processes", 0), "greater than or equal to 1"),
        (("train", run, "--data", data, "--recipe", recipe, "--device", "tpu"), "'auto', 'cpu', 'cuda'"),
        (("train", run, "--data", data, "--recipe", recipe, "--seed", -1), "greater than or equal to 0"),
        (("train", run, "--data", data, "--recipe", recipe, "--seed", 2**63), "less than or equal to 2147483647"),
        (("sheet", run, "--data", data, "--fraction", 40), "less than or equal to 1"),
        (("retrain",), "No such command"),
    ]
    for arguments, expected in cases:
        assert command(monkeypatch, *arguments) == 2
        told = capsys.readouterr().err
        assert expected in told
        assert "Traceback" not in told
    assert not run.exists()


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, data: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert command(monkeypatch, "train", file / "run", "--data", data, "--recipe", recipe) == 2
    assert capsys.readouterr().err == f"error: {file / 'run'}: Not a directory\n"


def test_a_full_disk_is_reported(
    tmp_path: Path, data: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").symlink_to("/dev/full")
    assert command(monkeypatch, "train", run, "--data", data, "--recipe", recipe, "--device", "cpu") == 2
    told = capsys.readouterr().err
    assert told == (
        f"error: No space left on device: make room, also for temporary files in {gettempdir()}, or raise the limit, "
        "and give the same command again\n"
    )


def test_a_checkpoint_that_does_not_fit_leaves_the_previous_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    kept = {"network": {}, "optimiser": {}, "progress": {"step": 1}}
    folder.save_checkpoint(kept)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        advice = "make room and give the same command again, which resumes from the previous checkpoint"
        with pytest.raises(RunError, match=advice):
            folder.save_checkpoint({"step": torch.zeros(100_000)})
        with pytest.raises(RunError, match=r"if the disk is full, make room and give the same command again$"):
            RunFolder(tmp_path).save_checkpoint({"step": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.load_checkpoint() == kept
    assert [path.name for path in folder.path.iterdir()] == ["checkpoint.pt"]


def test_checkpoints_load_without_executing_code(tmp_path: Path, data: Path, recipe: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    command(monkeypatch, "train", run, "--recipe", recipe, "--data", data, "--time-limit", 0)
    state = RunFolder(run).load_checkpoint()  # weights_only: other pickles are refused
    assert state.keys() == {"network", "optimiser", "progress"}
