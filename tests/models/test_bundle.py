"""Bundles: a good one loads, and each way to be damaged, foreign or hostile is refused by name, reason and fix."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.bundle import BundleError, files_digest, load_bundle, write_bundle
from models.calibration import Calibration
from models.exits import SCORES
from models.manifest import FileInfo, Manifest
from models.onnx_weights import load_stage_session
from tests.bundles import MEAN, REPOSITORY, STD, random_images, tiny_bundle, tiny_network
from training.export import Normalise


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "tiny")


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    (path / "manifest.json").write_text(json.dumps(manifest))


def seal(path: Path, manifest: dict[str, Any] | None = None) -> None:
    """Make sizes, digests and version fit the files again: what a forger would do."""
    manifest = manifest or read_manifest(path)
    for file, info in manifest["files"].items():
        data = (path / file).read_bytes()
        info.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest["version"] = files_digest({file: FileInfo(**info) for file, info in manifest["files"].items()})
    write_manifest(path, manifest)


def refusal(path: Path, verify: bool = True) -> BundleError:
    with pytest.raises(BundleError) as refused:
        load_bundle(path, verify)
    error = refused.value
    assert error.file in str(error)
    assert error.reason in str(error)
    assert error.fix in str(error)
    assert len(str(error)) < 1000
    return error


# --- a good one


def test_the_tiny_bundle_loads(bundle_path: Path) -> None:
    bundle = load_bundle(bundle_path)
    assert bundle.path == bundle_path
    assert len(bundle.manifest.exits) == len(bundle.stage_paths) == bundle.calibration.n_exits == 4
    assert bundle.calibration.n_images == bundle.manifest.data.heldout_images
    assert set(bundle.calibration.scores) == set(SCORES)
    assert bundle.costs_mflops == tuple(exit_.executed_mflops for exit_ in bundle.manifest.exits)
    assert load_bundle(str(bundle_path), verify=False).manifest == bundle.manifest
    for stated, measured in zip(bundle.manifest.exits, bundle.calibration.correct.mean(axis=0), strict=True):
        assert stated.heldout_accuracy == pytest.approx(measured)


def test_its_frontier_is_in_millions_of_multiply_adds(bundle_path: Path) -> None:
    bundle = load_bundle(bundle_path)
    for score in (None, *SCORES):
        frontier = bundle.frontier(score)
        assert frontier.cost[0] == pytest.approx(bundle.costs_mflops[0])
        assert frontier.accuracy[-1] > frontier.accuracy[0] + 0.2
    with pytest.raises(BundleError, match="no scores 'entropy'; choose one of logit_margin, max_softmax"):
        bundle.frontier("entropy")


def test_its_stages_answer_as_the_network_does(bundle_path: Path) -> None:
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
    assert (error.file, error.reason) == (file, "its sha256 is not the manifest's")


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_found_before_it_is_read(bundle_path: Path, verify: bool) -> None:
    data = (bundle_path / "weights.safetensors").read_bytes()
    (bundle_path / "weights.safetensors").write_bytes(data[:1000])
    error = refusal(bundle_path, verify)
    assert error.reason == f"1000 bytes where the manifest says {len(data)}"


def test_a_missing_file_is_named(bundle_path: Path) -> None:
    (bundle_path / "stages/stage_3.onnx").unlink()
    error = refusal(bundle_path)
    assert error.file == "stages/stage_3.onnx"
    assert "missing" in error.reason


def test_a_folder_in_the_place_of_a_file_is_refused(bundle_path: Path) -> None:
    (bundle_path / "README.md").unlink()
    (bundle_path / "README.md").mkdir()
    assert refusal(bundle_path).reason == "not a plain file"


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
        ('{"format_version": 2, "what": "ever"}', "format 2, and this ExitServe reads up to format 1"),
        ('{"format_version": 1}', "Field required"),
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle_path: Path, text: str, reason: str) -> None:
    (bundle_path / "manifest.json").write_bytes(text.encode("latin-1"))
    error = refusal(bundle_path)
    assert error.file == "manifest.json"
    assert reason in error.reason


def test_a_huge_manifest_is_refused_unread(bundle_path: Path) -> None:
    with (bundle_path / "manifest.json").open("r+b") as file:
        file.truncate(2**34)  # sparse: 16 GiB that would not fit into memory
    assert "larger than" in refusal(bundle_path).reason


def test_what_is_no_bundle_is_told(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere").reason
    (tmp_path / "file").touch()
    assert "not a folder" in refusal(tmp_path / "file").reason
    assert "not a bundle" in refusal(tmp_path).reason


def test_a_version_of_other_files_is_refused(bundle_path: Path) -> None:
    write_manifest(bundle_path, read_manifest(bundle_path) | {"version": "0" * 12})
    assert "does not belong to these files" in refusal(bundle_path).reason


def change(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return apply


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
        (change("exits", 1, "executed_mflops", to=float("inf")), "exits.1.executed_mflops"),
        (change("exits", 1, "executed_mflops", to=float("nan")), "exits.1.executed_mflops"),
        (change("exits", 0, "published_mflops", to=99.0), "published_mflops must be cumulative"),
        (change("exits", 0, "heldout_accuracy", to=71.2), "exits.0.heldout_accuracy: Input should be less"),
        (change("input", "height_px", to=0), "input.height_px: Input should be greater"),
        (change("input", "width_px", to=31), "stage 1 must take one uint8 image of the shape [32, 31, 3]"),
        (change("input", "std", to=[0.0, 1.0, 1.0]), "input.std.0: Input should be greater"),
        (change("stages", 1, "inputs", 0, "name", to="nobody"), "stage 2 reads 'nobody', which no earlier stage gives"),
        (change("stages", 1, "inputs", 0, "shape", to=[1]), "stage 2 reads"),
        (change("stages", 1, "inputs", 0, "dtype", to="object"), "stages.1.inputs.0.dtype: Input should be"),
        (change("stages", 0, "inputs", 0, "dtype", to="float32"), "stage 1 must take one uint8 image"),
        (change("stages", 1, "outputs", 0, "name", to="logits_1"), "stage 2 gives 'logits_1', which is there already"),
        (change("stages", 2, "file", to="stages/stage_9.onnx"), "files must list 'stages/stage_9.onnx'"),
        (lambda manifest: manifest["stages"].pop(), "3 stages for 4 exits"),
        (lambda manifest: manifest["files"].pop("calibration.npz"), "files must list 'calibration.npz'"),
        (change("score", to="entropy"), "score 'entropy' is not among those calibrated and known here"),
        (change("data", "heldout_images", to=1999), "where the manifest says 1999 images and 4 exits"),
        (change("data", "split_sha256", to="abc"), "data.split_sha256: String should match"),
        (change("files", "README.md", "bytes", to=-1), "files.README.md.bytes: Input should be greater"),
        (change("files", "README.md", "sha256", to="A" * 64), "files.README.md.sha256: String should match"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    bundle_path: Path, apply: Callable[[dict[str, Any]], None], reason: str
) -> None:
    manifest = read_manifest(bundle_path)
    apply(manifest)
    write_manifest(bundle_path, manifest)
    error = refusal(bundle_path)
    assert error.file in ("manifest.json", "calibration.npz")
    assert reason in error.reason


# --- hostile


@pytest.mark.parametrize(
    "file",
    [
        "../outside",
        "/etc/hostname",
        "stages/../../outside",
        "stages//stage_1.onnx",
        "./README.md",
        "..\\outside",
        "C:outside",
        "",
        ".hidden",
        "a\nb",
    ],
)
def test_paths_that_lead_out_are_refused_before_they_are_opened(bundle_path: Path, file: str) -> None:
    (bundle_path.parent / "outside").write_bytes(b"secret")
    manifest = read_manifest(bundle_path)
    manifest["files"][file] = {"bytes": 6, "sha256": "0" * 64}
    write_manifest(bundle_path, manifest)
    assert "is not a plain relative path inside the bundle" in refusal(bundle_path).reason


@pytest.mark.parametrize("file", ["README.md", "stages/stage_1.onnx", "manifest.json"])
def test_a_link_that_leads_out_is_refused(bundle_path: Path, file: str) -> None:
    moved = bundle_path.parent / "moved"
    (bundle_path / file).rename(moved)
    (bundle_path / file).symlink_to(moved)
    error = refusal(bundle_path)
    assert (error.file, error.reason) == (file, "a link that leads out of the bundle")


def test_a_linked_folder_that_leads_out_is_refused(bundle_path: Path) -> None:
    (bundle_path / "stages").rename(bundle_path.parent / "stages")
    (bundle_path / "stages").symlink_to(bundle_path.parent / "stages")
    assert refusal(bundle_path).reason == "a link that leads out of the bundle"


def test_a_link_in_a_circle_is_refused(bundle_path: Path) -> None:
    (bundle_path / "README.md").unlink()
    (bundle_path / "README.md").symlink_to("README.md")
    assert refusal(bundle_path).file == "README.md"


def test_links_within_and_to_the_bundle_are_fine(bundle_path: Path) -> None:
    (bundle_path / "README.md").rename(bundle_path / ".blob")
    (bundle_path / "README.md").symlink_to(".blob")
    (bundle_path.parent / "link").symlink_to(bundle_path)
    assert load_bundle(bundle_path.parent / "link").manifest.name == "tiny-random"


@pytest.mark.parametrize("file", ["stages/extra.onnx", "stages/deep/extra.bin", "other.bin"])
def test_a_file_that_no_digest_covers_is_refused(bundle_path: Path, file: str) -> None:
    (bundle_path / file).parent.mkdir(exist_ok=True)
    (bundle_path / file).touch()
    error = refusal(bundle_path)
    assert (error.file, error.reason) == (file, "not listed in the manifest")


def test_a_linked_folder_that_is_not_listed_is_refused(bundle_path: Path) -> None:
    (bundle_path / "stages/all").symlink_to("/")
    assert refusal(bundle_path).file == "stages/all"


def npy(values: np.ndarray, **save: Any) -> bytes:
    packed = BytesIO()
    np.lib.format.write_array(packed, values, **save)
    return packed.getvalue()


def forge(path: Path, members: dict[str, bytes]) -> BundleError:
    """The refusal of a bundle whose calibration holds these members, everything else being right."""
    with zipfile.ZipFile(path / "calibration.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    seal(path)
    return refusal(path)


def good_members() -> dict[str, bytes]:
    scores = np.zeros((2000, 4), dtype=np.float32)
    return {"correct.npy": npy(np.zeros((2000, 4), dtype=bool)), "scores_logit_margin.npy": npy(scores)}


def lying_header(shape: tuple[int, ...], descr: str) -> bytes:
    packed = BytesIO()
    np.lib.format.write_array_header_1_0(packed, {"descr": descr, "fortran_order": False, "shape": shape})
    return packed.getvalue() + b"\0" * 64


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"correct.npy": npy(np.array([{}]), allow_pickle=True)}, "does not describe"),
        ({"correct.npy": lying_header((10**9, 10**9), "|b1")}, "does not describe"),
        ({"correct.npy": lying_header((-8, -8), "|b1")}, ""),
        ({"correct.npy": lying_header((64,), "|O")}, "does not describe"),
        ({"correct.npy": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000}, ""),
        ({"correct.npy": b"\x93NUMPY\x03\x00" + b" " * 100}, "npy version"),
        ({"correct.npy": b"pickled?"}, ""),
        ({"correct.npy": npy(np.full((2000, 4), 2, dtype=np.uint8)).replace(b"|u1", b"|b1")}, "neither 0 nor 1"),
        ({"correct.npy": npy(np.zeros((2000, 4), dtype=np.int8))}, "must be bool"),
        ({"correct.npy": npy(np.zeros((2000, 4), dtype=bool, order="F"))}, "does not describe"),
        ({"correct.npy": npy(np.zeros((0, 4), dtype=bool))}, "must be bool"),
        ({"correct.npy": npy(np.zeros((1999, 4), dtype=bool))}, "must be float32 (1999, 4)"),
        ({"scores_logit_margin.npy": npy(np.zeros((2000, 4)))}, "must be float32"),
        ({"scores_logit_margin.npy": npy(np.full((2000, 4), np.nan, dtype=np.float32))}, "NaN or +inf"),
        ({"scores_logit_margin.npy": npy(np.full((2000, 4), np.inf, dtype=np.float32))}, "NaN or +inf"),
        ({"labels.npy": npy(np.zeros(4))}, "is neither"),
        ({"correct": npy(np.zeros((2000, 4), dtype=bool))}, "distinct names"),
        ({f"scores_{i}.npy": npy(np.zeros((2000, 4), dtype=np.float32)) for i in range(70)}, "more than 64 arrays"),
    ],
)
def test_a_forged_calibration_is_refused(bundle_path: Path, members: dict[str, bytes], reason: str) -> None:
    error = forge(bundle_path, good_members() | members)
    assert error.file == "calibration.npz"
    assert reason in error.reason


def test_a_calibration_without_scores_or_answers_is_refused(bundle_path: Path) -> None:
    members = good_members()
    assert "must hold `correct`" in forge(bundle_path, {"scores_a.npy": members["scores_logit_margin.npy"]}).reason
    assert "no scores" in forge(bundle_path, {"correct.npy": members["correct.npy"]}).reason
    assert (
        "'logit_margin' is not among"
        in forge(
            bundle_path,
            {"correct.npy": members["correct.npy"], "scores_max_softmax.npy": members["scores_logit_margin.npy"]},
        ).reason
    )


def test_a_zip_bomb_is_refused_before_it_is_unpacked(bundle_path: Path) -> None:
    bomb = lying_header((2**28,), "|b1")[:-64] + bytes(2**28)
    assert "unpacks to more than" in forge(bundle_path, good_members() | {"scores_bomb.npy": bomb}).reason
    assert (bundle_path / "calibration.npz").stat().st_size < 2**20


def test_a_zip_that_understates_its_sizes_is_refused(bundle_path: Path) -> None:
    path = bundle_path / "calibration.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in good_members().items():
            archive.writestr(name, member)
    true_size = struct.pack("<I", len(good_members()["correct.npy"]))
    assert path.read_bytes().count(true_size) == 2  # in the local header and in the directory
    path.write_bytes(path.read_bytes().replace(true_size, struct.pack("<I", 200)))
    seal(bundle_path)
    assert refusal(bundle_path).file == "calibration.npz"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_to_a_calibration_gets_further_than_a_value_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "calibration.npz"
    scores = np.arange(12, dtype=np.float32).reshape(3, 4)
    Calibration({"max_softmax": scores}, scores > 5).save(path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
    try:
        loaded = Calibration.load(path)
    except ValueError:
        return
    assert loaded.correct.dtype == np.bool_


# --- writing


def parts_of(path: Path, contents: Path) -> tuple[dict[str, Any], Calibration, Path]:
    shutil.copytree(path, contents)
    manifest = read_manifest(path)
    for key in ("format_version", "version", "files"):
        del manifest[key]
    (contents / "manifest.json").unlink()
    (contents / "calibration.npz").unlink()
    return manifest, load_bundle(path).calibration, contents


def test_what_is_written_reads_back_and_has_the_same_version(bundle_path: Path, tmp_path: Path) -> None:
    manifest, calibration, contents = parts_of(bundle_path, tmp_path / "contents")
    written = write_bundle(tmp_path / "deep" / "again", manifest, calibration, contents)
    original = load_bundle(bundle_path)
    assert written.manifest == original.manifest
    assert written.calibration.correct.tolist() == original.calibration.correct.tolist()
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"again"}
    assert load_bundle(tmp_path / "deep" / "again").manifest == original.manifest
    assert not (contents / "manifest.json").exists()


def test_one_changed_file_is_another_version(bundle_path: Path, tmp_path: Path) -> None:
    manifest, calibration, contents = parts_of(bundle_path, tmp_path / "contents")
    (contents / "README.md").write_text("other words")
    assert write_bundle(tmp_path / "again", manifest, calibration, contents).manifest.version != (
        load_bundle(bundle_path).manifest.version
    )


def test_a_bundle_is_replaced_only_when_asked(bundle_path: Path, tmp_path: Path) -> None:
    manifest, calibration, contents = parts_of(bundle_path, tmp_path / "contents")
    with pytest.raises(BundleError, match="stands there already"):
        write_bundle(bundle_path, manifest, calibration, contents)
    manifest["description"] = "another"
    assert write_bundle(bundle_path, manifest, calibration, contents, replace=True).manifest.description == "another"
    assert load_bundle(bundle_path).manifest.description == "another"
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "contents"}


def test_a_folder_of_something_else_is_never_replaced(bundle_path: Path, tmp_path: Path) -> None:
    manifest, calibration, contents = parts_of(bundle_path, tmp_path / "contents")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").touch()
    with pytest.raises(BundleError, match="no bundle"):
        write_bundle(tmp_path / "work", manifest, calibration, contents, replace=True)
    assert (tmp_path / "work" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("score", "entropy", "'entropy' is not among"), ("name", "a/b", "name: String"), ("training", {1: {2}}, "JSON")],
)
def test_what_would_not_load_is_not_written(
    bundle_path: Path, tmp_path: Path, field: str, value: Any, reason: str
) -> None:
    manifest, calibration, contents = parts_of(bundle_path, tmp_path / "contents")
    before = load_bundle(bundle_path)
    with pytest.raises(BundleError, match=reason):
        write_bundle(bundle_path, manifest | {field: value}, calibration, contents, replace=True)
    assert load_bundle(bundle_path).manifest == before.manifest
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "contents"}


def test_the_manifest_of_a_bundle_cannot_be_changed_in_place(bundle_path: Path) -> None:
    manifest = load_bundle(bundle_path).manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.name = "other"
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize("seed", [0, 1])
def test_a_calibration_is_written_the_same_every_time(tmp_path: Path, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(50, 3)).astype(np.float32)
    scores[0, 0] = -np.inf
    calibration = Calibration({"max_softmax": scores, "logit_margin": scores * 2}, scores > 0)
    calibration.save(tmp_path / "one.npz")
    calibration.save(tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    loaded = Calibration.load(tmp_path / "one.npz")
    assert np.array_equal(loaded.scores["max_softmax"], scores)
    assert np.array_equal(loaded.correct, scores > 0)
    with np.load(tmp_path / "one.npz", allow_pickle=False) as plain:
        assert set(plain.files) == {"correct", "scores_max_softmax", "scores_logit_margin"}
