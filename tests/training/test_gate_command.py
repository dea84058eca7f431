"""`python -m training gate`: makes a run with gates from a run, and then a bundle that is served with them."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import load_bundle
from models.exits import take_exits
from models.gates import GATE_FEATURES, GateScore
from models.scores import score_exits
from service.assembly import build_engine
from tests.training import tiny
from tests.training.test_command import command
from training.calibration import CalibrationRecord, ExitOutputs, load_trained
from training.checkpoint import RunFolder
from training.data import load_image_set
from training.evaluation import cost_of
from training.jei.inputs import head_rows
from training.jei.record import SCORE, GateRecord, published_decision
from training.quantising import quantise

TIE = 1e-4  # a score this close to a threshold may fall to either side


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images, an evaluated run, and a gated run with new heads."""
    folder = tmp_path_factory.mktemp("gated")
    data = tiny.write_folder(folder / "cifar-100-python")
    recipe = tiny.write_recipe(folder / "tiny.toml", epochs=6, n_exits=3)
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "train", folder / "run", "--recipe", recipe, "--data", data, "--device", "cpu") == 0
        assert command(patch, "calibrate", folder / "run", "--data", data, "--device", "cpu") == 0
        assert command(patch, "evaluate", folder / "run") == 0
        options = ("--trade-off", 0.2, "--heads", "fresh", "--epochs", 2, "--device", "cpu")
        gate = ("gate", folder / "run", "--data", data, "--output", folder / "gated")
        assert command(patch, *gate, *options) == 0
    return folder


def test_gates_are_tabulated_plotted_and_saved(made: Path) -> None:
    for name in ("gates.json", "gates.csv", "gates.png"):
        assert (made / "gated" / name).stat().st_size > 0
    gates = GateRecord.load(RunFolder(made / "gated"))
    assert gates is not None
    assert (gates.settings.trade_off, gates.settings.heads, gates.source) == (0.2, "fresh", "run")
    # Two steps are less than a turn, so there are only the gates of the start and of the end.
    assert [turn.step for turn in gates.turns] == [0, 2]
    costs = cost_of(RunFolder(made / "run"), CalibrationRecord.load(RunFolder(made / "run"))).executed
    heldout, test = (ExitOutputs.load(made / "gated" / name) for name in ("heldout.npz", "test.npz"))
    decided = [published_decision(part.scores[SCORE], part.correct, costs) for part in (heldout, test)]
    kept = gates.turns[gates.kept]
    assert (kept.cost_share, kept.accuracy) == pytest.approx((decided[0].mean_cost / costs[-1], decided[0].accuracy))
    with (made / "gated" / "gates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert rows[0]["name"].startswith("gates as published")
    for part, done in zip(("heldout", "test"), decided, strict=True):
        told = float(rows[0][f"{part}_mflops"]), float(rows[0][f"{part}_accuracy"])
        assert told == pytest.approx((done.mean_cost / 1e6, done.accuracy), rel=1e-4)


def test_only_the_last_layers_change(made: Path) -> None:
    before, after = (RunFolder(made / name).load_checkpoint()["network"] for name in ("run", "gated"))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {f"heads.{i}.classifier.{name}" for i in range(3) for name in ("weight", "bias")}


def test_cached_head_inputs_give_the_whole_networks_calibration(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gate` writes a calibration without running the network; `calibrate` gives the same."""
    folder = RunFolder(made / "gated")
    before = [ExitOutputs.load(path) for path in (folder.heldout, folder.test)]
    record = CalibrationRecord.load(folder)
    data = made / "cifar-100-python"
    assert command(monkeypatch, "calibrate", folder.path, "--data", data, "--device", "cpu") == 0
    after = [ExitOutputs.load(path) for path in (folder.heldout, folder.test)]
    for old, new in zip(before, after, strict=True):
        assert (old.correct == new.correct).mean() > 0.97  # rounding may change close answers
        for name, values in old.scores.items():
            close = np.isclose(values, new.scores[name], atol=1e-3)
            assert close.mean() > 0.97, name
    assert CalibrationRecord.load(folder) == record


def test_the_bundle_of_a_gated_run_exits_by_its_gates(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = made / "gated", made / "zoo" / "gated"
    assert command(monkeypatch, "evaluate", run) == 0
    assert "jei_gates" in capsys.readouterr().out
    assert command(monkeypatch, "export", run, "--output", output) == 0
    bundle = load_bundle(output)
    manifest = bundle.manifest
    assert manifest.score == SCORE
    assert manifest.predictor is not None
    assert tuple(manifest.predictor.features) == GATE_FEATURES
    assert isinstance(bundle.score(), GateScore)
    card = (output / "README.md").read_text()
    assert "JEI-DNN" in card
    assert "trade-off 0.2" in card
    told = manifest.training["gates"]
    assert isinstance(told, dict)
    test = ExitOutputs.load(run / "test.npz")
    costs = list(bundle.costs_mflops)
    decided = published_decision(test.scores[SCORE], test.correct, costs)
    assert told["published_decision"]["test"]["accuracy"] == pytest.approx(decided.accuracy)
    assert f"{decided.mean_cost:.2f} M" in card

    # In the engine, images leave where the score of the whole network's logits predicts.
    pixels, _ = tiny.coloured(tiny.N_TEST, 2)
    folder = RunFolder(run)
    record = CalibrationRecord.load(folder)
    network, _ = load_trained(folder, len(record.class_names), record.half_weights, record.ensemble)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (record.mean, record.std))
    with torch.no_grad():
        logits = [x.numpy() for x in network((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)]
    scores = score_exits(bundle.score(), logits)
    assert scores == pytest.approx(test.scores[SCORE], abs=1e-3)
    frontier = bundle.frontier()
    engine = build_engine(bundle, 0.5 * (frontier.cost[0] + frontier.cost[-1]), device="cpu", steer=False, max_rows=7)
    engine.start()
    try:
        thresholds = np.array(engine.budget_state().thresholds)
        answers = [future.result(60) for future in [engine.submit(image) for image in pixels]]
    finally:
        engine.drain(60)
    clear = (np.abs(scores - thresholds) > TIE).all(axis=1)
    assert clear.mean() > 0.8
    expected = take_exits(scores, thresholds) + 1
    assert [a.exit for a, c in zip(answers, clear, strict=True) if c] == expected[clear].tolist()

    # Int8 stages keep the gates.
    quantised = quantise(output, load_image_set(made / "cifar-100-python"), 40, made / "zoo" / "int8").bundle.int8
    assert quantised is not None
    assert quantised.manifest.predictor == manifest.predictor
    assert SCORE in quantised.calibration.scores
    assert isinstance(quantised.score(), GateScore)


def test_another_gating_reuses_the_cached_head_inputs(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = made / "run" / "head_inputs.pt"
    written = cache.stat().st_mtime_ns
    data, output = made / "cifar-100-python", made / "kept"
    gate = ("gate", made / "run", "--data", data, "--output", output, "--heads", "kept", "--device", "cpu")
    assert command(monkeypatch, *gate) == 0
    assert cache.stat().st_mtime_ns == written
    before, after = (RunFolder(made / name).load_checkpoint()["network"] for name in ("run", "kept"))
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert (output / "gates.png").stat().st_size > 0
    with (output / "gates.csv").open() as file:
        rows = list(csv.DictReader(file))
    [same] = [row for row in rows if row["name"].endswith("on the new heads")]
    assert [float(same[f"over_chosen_{key}"]) for key in ("mean", "error")] == pytest.approx([0, 0], abs=1e-3)


def test_a_damaged_cache_is_rebuilt(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, data = made / "run" / "head_inputs.pt", made / "cifar-100-python"
    gate = ("gate", made / "run", "--data", data, "--heads", "kept", "--device", "cpu", "--output")
    assert command(monkeypatch, *gate, made / "plain", "--passes", 0) == 0
    cache.write_bytes(cache.read_bytes()[:1000])
    assert command(monkeypatch, *gate, made / "plain-again", "--passes", 0) == 0
    first, second = (json.loads((made / name / "gates.json").read_text()) for name in ("plain", "plain-again"))
    assert first["gates"] == second["gates"]


def test_changed_test_images_are_not_taken_from_the_cache(made: Path, tmp_path: Path) -> None:
    """The test images may change, after which the run is calibrated again."""
    folder = RunFolder(Path(shutil.copytree(made / "run", tmp_path / "run")))
    images, record = load_image_set(made / "cifar-100-python"), CalibrationRecord.load(folder)
    kept = head_rows(folder, record, images, torch.device("cpu"), 1, 0)
    last = slice(-20, None)
    other = replace(images, test_images=images.test_images[last], test_labels=images.test_labels[last])
    rows = head_rows(folder, record, other, torch.device("cpu"), 1, 0)
    assert rows.test.labels.tolist() == other.test_labels.tolist()
    assert torch.allclose(rows.test.inputs[0], kept.test.inputs[0][last], atol=1e-5)


def test_every_pass_augments_the_training_images_anew_and_no_others(made: Path, tmp_path: Path) -> None:
    folder = RunFolder(Path(shutil.copytree(made / "run", tmp_path / "run")))
    images, record = load_image_set(made / "cifar-100-python"), CalibrationRecord.load(folder)
    plain, moved = (head_rows(folder, record, images, torch.device("cpu"), passes, 0) for passes in (0, 2))
    assert moved.train.labels.tolist() == 2 * plain.train.labels.tolist()
    for unmoved, both in zip(plain.train.inputs, moved.train.inputs, strict=True):
        first, second = both.split(len(unmoved))
        assert not torch.allclose(first, second, atol=1e-3)
        assert not torch.allclose(first, unmoved, atol=1e-3)
    for one, other in ((plain.heldout, moved.heldout), (plain.test, moved.test)):
        assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))


def test_runs_that_cannot_be_gated_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = made / "cifar-100-python", tmp_path / "out"
    other = tiny.write_folder(tmp_path / "other" / "cifar-100-python")
    (other / "train").write_bytes(tiny.official_parts(n_train=80)["train"])
    raw = tmp_path / "raw"
    assert command(monkeypatch, "train", raw, "--recipe", tiny.write_recipe(tmp_path / "t.toml"), "--data", data) == 0
    capsys.readouterr()
    cases = [
        ((tmp_path / "nowhere", "--data", data, "--output", output), "no run there"),
        ((raw, "--data", data, "--output", output), "not calibrated yet"),
        ((made / "gated", "--data", data, "--output", output), "already has gates"),
        ((made / "run", "--data", data, "--output", made / "gated"), "holds a run already"),
        ((made / "run", "--data", other, "--output", output), "80 training images"),
        ((made / "run", "--data", data, "--output", output, "--trade-off", -1), "--trade-off"),
        ((made / "run", "--data", data, "--output", output, "--trade-off", "inf"), "less than or equal to 1000000"),
    ]
    for arguments, expected in cases:
        assert command(monkeypatch, "gate", *arguments) == 2
        told = capsys.readouterr().err
        assert expected in told, told
        assert "Traceback" not in told
    assert command(monkeypatch, "calibrate", raw, "--data", data) == 0
    assert command(monkeypatch, "gate", raw, "--data", data, "--output", output) == 2
    assert "python -m training evaluate" in capsys.readouterr().err
    assert not output.exists()
    (raw / "gates.json").write_text("{}")
    assert command(monkeypatch, "evaluate", raw) == 2
    assert "gates.json: damaged, or from another version" in capsys.readouterr().err
