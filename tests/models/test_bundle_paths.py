"""Bundles cannot refer to files outside their folder, nor contain files without a digest."""

from pathlib import Path

import pytest

from models.bundle import load_bundle
from tests.bundles import read_manifest, refusal, write_manifest


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
def test_paths_out_of_the_bundle_are_refused_before_they_are_opened(bundle_path: Path, file: str) -> None:
    (bundle_path.parent / "outside").write_bytes(b"secret")
    manifest = read_manifest(bundle_path)
    manifest["files"][file] = {"bytes": 6, "sha256": "0" * 64}
    write_manifest(bundle_path, manifest)
    assert "is not a plain relative path inside the bundle" in refusal(bundle_path).reason


@pytest.mark.parametrize("file", ["README.md", "stages/stage_1.onnx", "manifest.json"])
def test_a_link_out_of_the_bundle_is_refused(bundle_path: Path, file: str) -> None:
    moved = bundle_path.parent / "moved"
    (bundle_path / file).rename(moved)
    (bundle_path / file).symlink_to(moved)
    error = refusal(bundle_path)
    assert (error.file, error.reason) == (file, "a link to a file outside the bundle")


def test_a_linked_folder_out_of_the_bundle_is_refused(bundle_path: Path) -> None:
    (bundle_path / "stages").rename(bundle_path.parent / "stages")
    (bundle_path / "stages").symlink_to(bundle_path.parent / "stages")
    assert refusal(bundle_path).reason == "a link to a file outside the bundle"


def test_a_circular_link_is_refused(bundle_path: Path) -> None:
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
