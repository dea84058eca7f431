"""Bundles: good ones load; damaged or foreign ones are refused with the file, the reason and a fix."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from models.bundle import BundleError, load_bundle
from models.calibration import Calibration
from models.gates import GATE_FEATURES
from models.onnx_weights import load_stage_session
from models.predictor import FEATURES, Predictor
from models.scores import plain_scores, score_exits
from tests.bundles import (
    MEAN,
    REPOSITORY,
    STD,
    random_images,
    read_manifest,
    refusal,
    seal,
    tiny_network,
    write_manifest,
)
from training.export import Normalise


def test_the_tiny_bundle_loads(bundle_path: Path) -> None:
    bundle = load_bundle(bundle_path)
    assert bundle.path == bundle_path
    assert len(bundle.manifest.exits) == len(bundle.manifest.stages) == 4
    assert bundle.calibration.correct.shape == (bundle.manifest.data.heldout_images, 4)
    assert set(bundle.calibration.scores) == set(plain_scores(4))
    assert bundle.costs_mflops == tuple(exit_.executed_mflops for exit_ in bundle.manifest.exits)
    assert load_bundle(str(bundle_path), verify=False).manifest == bundle.manifest
    for stated, measured in zip(bundle.manifest.exits, bundle.calibration.correct.mean(axis=0), strict=True):
        assert stated.heldout_accuracy == pytest.approx(measured)


def test_its_frontier_is_in_millions_of_multiply_adds(bundle_path: Path) -> None:
    bundle = load_bundle(bundle_path)
    frontier = bundle.frontier()
    assert frontier.cost[0] == pytest.approx(bundle.costs_mflops[0])
    assert frontier.accuracy[-1] > frontier.accuracy[0] + 0.2


def test_its_stages_give_the_networks_answers(bundle_path: Path) -> None:
    """Run as served: stage by stage on uint8 images, values passed on by name."""
    bundle = load_bundle(bundle_path)
    images = random_images(16, seed=5)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    values: dict[str, np.ndarray] = {bundle.manifest.stages[0].inputs[0].name: images}
    served = []
    for stage in bundle.manifest.stages:
        session = load_stage_session(bundle_path, stage.file, session_options=options)
        outputs = session.run(
            [value.name for value in stage.outputs], {value.name: values[value.name] for value in stage.inputs}
        )
        served.append(outputs[0])
        for described, value in zip(stage.outputs, outputs, strict=True):
            assert [len(images), *described.shape] == list(value.shape)
            assert described.dtype == str(value.dtype)
            values[described.name] = value
    with torch.no_grad():
        whole = tiny_network()(Normalise(MEAN, STD)(torch.from_numpy(images)))
    for one, other in zip(served, whole, strict=True):
        assert one == pytest.approx(other.numpy(), abs=1e-4)


def test_reading_a_bundle_needs_no_torch(bundle_path: Path) -> None:
    program = (
        f"import sys; from models.bundle import load_bundle; load_bundle({str(bundle_path)!r}).frontier().at(0.5); "
        "sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


# --- damaged


@pytest.mark.parametrize("file", ["stages/stage_2.onnx", "weights.safetensors", "calibration.npz", "README.md"])
def test_one_changed_byte_is_found(bundle_path: Path, file: str) -> None:
    data = bytearray((bundle_path / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_path / file).write_bytes(data)
    error = refusal(bundle_path)
    assert (error.file, error.reason) == (file, "its sha256 differs from the manifest's")


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_of_another_size_is_found_before_it_is_read(bundle_path: Path, verify: bool) -> None:
    data = (bundle_path / "weights.safetensors").read_bytes()
    for changed in (data[:1000], data + b"\0"):
        (bundle_path / "weights.safetensors").write_bytes(changed)
        assert refusal(bundle_path, verify).reason == f"{len(changed)} bytes, but the manifest says {len(data)}"


def test_a_missing_file_is_named(bundle_path: Path) -> None:
    (bundle_path / "stages/stage_3.onnx").unlink()
    error = refusal(bundle_path)
    assert error.file == "stages/stage_3.onnx"
    assert "missing" in error.reason


@pytest.mark.parametrize("shut", ["manifest.json", "stages/stage_2.onnx", "stages"])
def test_unreadable_files_are_reported_as_such_and_not_as_missing(bundle_path: Path, shut: str) -> None:
    """For example a bundle exported under a strict umask and served by another user."""
    with tempfile.TemporaryDirectory() as open_to_all:
        Path(open_to_all).chmod(0o755)
        path = Path(shutil.copytree(bundle_path, Path(open_to_all, "bundle")))
        (path / shut).chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may read everything
        try:
            error = refusal(path)
        finally:
            os.seteuid(user)
            (path / shut).chmod(0o700)
    assert error.file.startswith(shut)
    assert error.reason == "it cannot be read (Permission denied)"
    assert "chmod" in error.fix


def test_a_folder_in_the_place_of_a_file_is_refused(bundle_path: Path) -> None:
    (bundle_path / "README.md").unlink()
    (bundle_path / "README.md").mkdir()
    assert refusal(bundle_path).reason == "not a regular file"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\xff\xfe", "not JSON"),
        ("[]", "no format_version"),
        ('{"format_version": "1"}', "no format_version"),
        ('{"format_version": true}', "no format_version"),
        ('{"model": "of something else"}', "no format_version"),
        ('{"format_version": 4, "what": "ever"}', "format 4, but this ExitServe reads formats up to 3"),
        ('{"format_version": 1}', "Field required"),
    ],
)
def test_an_invalid_manifest_is_refused(bundle_path: Path, text: str, reason: str) -> None:
    (bundle_path / "manifest.json").write_bytes(text.encode("latin-1"))
    error = refusal(bundle_path)
    assert error.file == "manifest.json"
    assert reason in error.reason


def test_a_huge_manifest_is_refused_without_reading_it(bundle_path: Path) -> None:
    with (bundle_path / "manifest.json").open("r+b") as file:
        file.truncate(2**34)  # sparse: 16 GiB that would not fit into memory
    assert "larger than" in refusal(bundle_path).reason


def test_paths_that_are_no_bundle_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere").reason
    assert refusal(tmp_path / "cifar100-msdnet").fix.endswith(
        "models/zoo/cifar100-msdnet"
    )  # the folder named in its card
    (tmp_path / "file").touch()
    assert "not a folder" in refusal(tmp_path / "file").reason
    assert "not a bundle" in refusal(tmp_path).reason


def test_a_version_that_does_not_match_the_files_is_refused(bundle_path: Path) -> None:
    write_manifest(bundle_path, read_manifest(bundle_path) | {"version": "0" * 12})
    assert "does not belong to these files" in refusal(bundle_path).reason


def change(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return apply


def predictor_of(n_exits: int, features: Sequence[str] = FEATURES) -> dict[str, Any]:
    row = [0.5] * (len(features) + 1)
    return {"features": [*features], "gain": [row] * n_exits, "loss": None}


def gates_of(n_exits: int) -> dict[str, Any]:
    return predictor_of(n_exits, GATE_FEATURES)


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (change("extra", to=1), "extra: Extra inputs"),
        (change("input", "extra", to=1), "input.extra: Extra inputs"),
        (change("name", to="../up"), "name: String should match"),
        (change("name", to=""), "name: String should have at least 1"),
        (change("name", to=7), "name: Input should be a valid string"),
        (change("class_names", to=["one"]), "class_names: List should have at least 2"),
        (change("class_names", to=["one", "two"]), "float32 logits of 2 classes"),
        (change("exits", to=[]), "exits: List should have at least 1"),
        (change("exits", 0, "executed_mflops", to=-1.0), "exits.0.executed_mflops: Input should be greater"),
        (change("exits", 0, "executed_mflops", to="1.0"), "exits.0.executed_mflops: Input should be a valid number"),
        (change("exits", 0, "executed_mflops", to=99.0), "executed_mflops must be cumulative"),
        (change("exits", 0, "executed_mflops", to=1e-9), "in whole multiply-adds"),  # costs are divisors
        (lambda m: m["exits"][1].update(executed_mflops=m["exits"][0]["executed_mflops"]), "must be cumulative"),
        (change("exits", 1, "executed_mflops", to=float("inf")), "exits.1.executed_mflops"),
        (change("exits", 1, "executed_mflops", to=float("nan")), "exits.1.executed_mflops"),
        (change("exits", 0, "published_mflops", to=99.0), "published_mflops must be cumulative"),
        (change("exits", 0, "heldout_accuracy", to=71.2), "exits.0.heldout_accuracy: Input should be less"),
        (change("exits", 1, "heldout_accuracy", to=0.01), "are right where the manifest says 0.0100"),
        (lambda m: m["exits"][1].update(heldout_accuracy=m["exits"][1]["heldout_accuracy"] - 1 / 2000), "are right"),
        (change("input", "height_px", to=0), "input.height_px: Input should be greater"),
        (change("input", "width_px", to=31), "stage 1 must take one uint8 image of the shape [32, 31, 3]"),
        (change("input", "std", to=[0.0, 1.0, 1.0]), "input.std.0: Input should be greater"),
        (change("stages", 1, "inputs", 0, "name", to="nobody"), "stage 2 reads 'nobody', which no earlier stage gives"),
        (change("stages", 1, "inputs", 0, "shape", to=[1]), "stage 2 reads"),
        (change("stages", 0, "outputs", 1, "shape", to=[10**9] * 8), "more than 268435456 numbers per row"),
        (change("stages", 1, "inputs", 0, "dtype", to="object"), "stages.1.inputs.0.dtype: Input should be"),
        (change("stages", 0, "inputs", 0, "dtype", to="float32"), "stage 1 must take one uint8 image"),
        (change("stages", 1, "outputs", 0, "name", to="logits_1"), "stage 2 returns 'logits_1', which exists already"),
        (change("stages", 2, "file", to="stages/stage_9.onnx"), "files must list 'stages/stage_9.onnx'"),
        (lambda manifest: manifest["stages"].pop(), "3 stages for 4 exits"),
        (lambda manifest: manifest["files"].pop("calibration.npz"), "files must list 'calibration.npz'"),
        (change("score", to="vibes"), "score 'vibes' is not among the calibrated scores known here"),
        (change("family", to="vibes"), "unknown family of thresholds 'vibes'; known: geometric, ratio, optimal"),
        (
            change("predictor", to={"features": ["x"], "gain": [[1.0, 2.0]], "loss": None}),
            "its predictor is not one for",
        ),
        (change("predictor", to={"features": ["x"], "gain": [[1.0]], "loss": None}), "must have 1 weights and a bias"),
        (change("predictor", to=predictor_of(4)), "score 'logit_margin' is not fitted"),
        (change("predictor", to=predictor_of(3)), "its predictor is not one for 4 exits"),
        (
            change("predictor", to=predictor_of(4) | {"gain": [[float("nan")] * (len(FEATURES) + 1)] * 4}),
            "predictor.gain",
        ),
        (change("predictor", to=gates_of(3)), "its predictor is not one for 4 exits"),
        (change("predictor", to=gates_of(4) | {"loss": gates_of(4)["gain"]}), "gates have no `loss`"),
        (change("data", "heldout_images", to=1999), "but the manifest says 1999 images and 4 exits"),
        (change("data", "split_sha256", to="abc"), "data.split_sha256: String should match"),
        (change("files", "README.md", "bytes", to=-1), "files.README.md.bytes: Input should be greater"),
        (change("files", "README.md", "sha256", to="A" * 64), "files.README.md.sha256: String should match"),
    ],
)
def test_an_inconsistent_manifest_is_refused(
    bundle_path: Path, apply: Callable[[dict[str, Any]], None], reason: str
) -> None:
    manifest = read_manifest(bundle_path)
    apply(manifest)
    write_manifest(bundle_path, manifest)
    error = refusal(bundle_path)
    assert error.file in ("manifest.json", "calibration.npz")
    assert reason in error.reason


def test_a_bundle_that_replaced_another_is_detected(bundle_path: Path) -> None:
    """Both are valid, but the stages of one must not be used with the thresholds of the other."""
    bundle = load_bundle(bundle_path)
    bundle.check_unchanged()
    manifest = read_manifest(bundle_path)
    text = (bundle_path / "README.md").read_text()
    (bundle_path / "README.md").write_text(f"B{text[1:]}")  # of the same size
    seal(bundle_path, manifest)
    assert load_bundle(bundle_path).manifest.version != bundle.manifest.version
    with pytest.raises(BundleError, match="another bundle was put there while this one was opened; start again"):
        bundle.check_unchanged()
    (bundle_path / "weights.safetensors").write_bytes(b"cut short")
    with pytest.raises(BundleError, match="truncated or changed"):
        bundle.check_unchanged()


def test_a_fitted_score_is_served_with_its_weights(bundle_path: Path) -> None:
    """Its weights are in the manifest and its scores in the calibration; format 1 had neither and is still read."""
    bundle = load_bundle(bundle_path)
    arrays = {**bundle.calibration.scores, "as_good": bundle.calibration.scores["logit_margin"]}
    Calibration(arrays, bundle.calibration.correct).save(bundle_path / "calibration.npz")
    manifest = read_manifest(bundle_path)
    manifest["score"], manifest["family"], manifest["predictor"] = "as_good", "optimal", predictor_of(4)
    seal(bundle_path, manifest)
    fitted = load_bundle(bundle_path)
    assert fitted.frontier().family == "optimal"
    logits = np.random.default_rng(0).normal(size=(4, 5, 10)).astype(np.float32)
    row = np.array(predictor_of(4)["gain"])
    assert np.array_equal(score_exits(fitted.score(), logits), score_exits(Predictor(row), logits))
