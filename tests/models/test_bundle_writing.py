"""Writing bundles: atomically, and only if they would load."""

import errno
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.bundle import BundleError, load_bundle
from models.bundle_writing import write_bundle
from models.calibration import Calibration
from models.manifest import Manifest
from tests.bundles import read_manifest


def parts_of(path: Path, contents: Path) -> tuple[dict[str, Any], Calibration, Path]:
    shutil.copytree(path, contents)
    manifest = read_manifest(path)
    for key in ("format_version", "version", "files"):
        del manifest[key]
    (contents / "manifest.json").unlink()
    (contents / "calibration.npz").unlink()
    return manifest, load_bundle(path).calibration, contents


def test_a_written_bundle_loads_and_has_the_same_version(bundle_path: Path, tmp_path: Path) -> None:
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


def test_a_bundle_is_replaced_only_on_request(bundle_path: Path, tmp_path: Path) -> None:
    manifest, calibration, contents = parts_of(bundle_path, tmp_path / "contents")
    with pytest.raises(BundleError, match="it exists already"):
        write_bundle(bundle_path, manifest, calibration, contents)
    manifest["description"] = "another"
    assert write_bundle(bundle_path, manifest, calibration, contents, replace=True).manifest.description == "another"
    assert load_bundle(bundle_path).manifest.description == "another"
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "contents"}


def test_a_folder_that_is_no_bundle_is_never_replaced(bundle_path: Path, tmp_path: Path) -> None:
    manifest, calibration, contents = parts_of(bundle_path, tmp_path / "contents")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").touch()
    with pytest.raises(BundleError, match="other than a bundle"):
        write_bundle(tmp_path / "work", manifest, calibration, contents, replace=True)
    assert (tmp_path / "work" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("score", "vibes", "'vibes' is not among"), ("name", "a/b", "name: String"), ("training", {1: {2}}, "JSON")],
)
def test_a_bundle_that_would_not_load_is_not_written(
    bundle_path: Path, tmp_path: Path, field: str, value: Any, reason: str
) -> None:
    manifest, calibration, contents = parts_of(bundle_path, tmp_path / "contents")
    before = load_bundle(bundle_path)
    with pytest.raises(BundleError, match=reason):
        write_bundle(bundle_path, manifest | {field: value}, calibration, contents, replace=True)
    assert load_bundle(bundle_path).manifest == before.manifest
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "contents"}


def test_a_file_that_does_not_fit_is_told_by_its_number(bundle_path: Path, tmp_path: Path) -> None:
    """And leaves nothing behind."""
    manifest, calibration, contents = parts_of(bundle_path, tmp_path / "contents")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match="too large") as told:
            write_bundle(tmp_path / "new", manifest, calibration, contents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.errno == errno.EFBIG
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "contents"}


def test_the_manifest_of_a_bundle_cannot_be_changed_in_place(bundle_path: Path) -> None:
    manifest = load_bundle(bundle_path).manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.name = "other"
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
