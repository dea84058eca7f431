"""Bundles with int8 stages: round trip, older formats, and checks of every part."""

from pathlib import Path

import pytest

from models.bundle import load_bundle
from models.calibration import CALIBRATION_INT8, Calibration
from models.scores import plain_scores
from tests.bundles import read_manifest, refusal, seal, tiny_bundle, tiny_int8_bundle


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_int8_bundle(tmp_path / "bundle")


def test_the_manifest_describes_each_precision(path):
    bundle = load_bundle(path)
    int8 = bundle.at("int8")
    assert (bundle.precision, int8.precision) == ("fp32", "int8")
    assert bundle.at("fp32") is bundle
    assert [stage.file for stage in int8.manifest.stages] == [f"stages_int8/stage_{k}.onnx" for k in range(1, 5)]
    told = read_manifest(path)
    assert told["format_version"] == 3
    assert [stage.model_dump() for stage in int8.manifest.stages] == told["int8"]["stages"]
    for float_exit, int8_exit, measured in zip(
        bundle.manifest.exits, int8.manifest.exits, told["int8"]["exits"], strict=True
    ):
        assert int8_exit.model_dump() == {**float_exit.model_dump(), **measured}


@pytest.mark.parametrize("version", [1, 2])
def test_older_formats_are_read(tmp_path, version):
    path = tiny_bundle(tmp_path / "old")
    manifest = read_manifest(path)
    manifest["format_version"] = version
    manifest.pop("int8", None)
    for field in ("family", "predictor") if version == 1 else ():
        del manifest[field]
    seal(path, manifest)
    bundle = load_bundle(path)
    assert bundle.int8 is None
    assert bundle.score() == plain_scores(4)["logit_margin"]
    assert bundle.frontier().family in ("geometric", "ratio")


def test_every_int8_file_is_checked(path):
    stage = path / "stages_int8" / "stage_2.onnx"
    stage.write_bytes(stage.read_bytes()[:-1] + b"x")
    assert "sha256" in refusal(path).reason
    stage.unlink()
    assert refusal(path).file == "stages_int8/stage_2.onnx"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda int8: int8["stages"].pop(), "3 stages for 4 exits"),
        (lambda int8: int8["exits"].pop(), "every exit's accuracy"),
        (lambda int8: int8["stages"][1]["inputs"][0].update(dtype="float32"), "no earlier stage gives in that form"),
        (lambda int8: int8["stages"][0].update(file="stages_int8/other.onnx"), "files must list"),
        (lambda int8: int8["stages"][0].update(file="../other.onnx"), "not a plain relative path"),
        (lambda int8: int8.update(weights="x"), "Extra inputs"),
        (lambda int8: int8.update(predictor={"features": ["a"], "gain": [[0.0, 0.0]], "loss": None}), "predictor"),
    ],
)
def test_inconsistent_int8_parts_are_refused(path, change, reason):
    manifest = read_manifest(path)
    change(manifest["int8"])
    seal(path, manifest)
    assert reason in refusal(path).reason


def test_its_calibration_must_be_of_the_same_images_and_score(path):
    manifest = read_manifest(path)
    whole = Calibration.load(path / CALIBRATION_INT8)
    fewer = {name: values[:-1] for name, values in whole.scores.items()}
    Calibration(fewer, whole.correct[:-1]).save(path / CALIBRATION_INT8)
    seal(path, manifest)
    error = refusal(path)
    assert (error.file, "shape" in error.reason) == (CALIBRATION_INT8, True)
    Calibration({"entropy": whole.scores["entropy"]}, whole.correct).save(path / CALIBRATION_INT8)
    seal(path, manifest)
    assert "logit_margin" in refusal(path).reason
