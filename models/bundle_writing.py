"""Writes bundles atomically: a complete and checked bundle appears by one rename, or none at all."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.bundle import MANIFEST, Bundle, BundleError, files_digest, load_bundle, sha256_of
from models.calibration import CALIBRATION, Calibration
from models.manifest import FORMAT_VERSION, FileInfo


def check_target(target: Path, replace: bool) -> None:
    """Check that a bundle may be written to `target`; to be called before long work.

    Raises:
        BundleError: `target` exists and may not be replaced.
    """
    if target.exists() and not replace:
        raise BundleError(target, "", "it exists already", "give another folder, or replace it")
    if target.exists() and not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise BundleError(target, "", "it contains something other than a bundle", "give another folder")


def write_bundle(
    folder: Path | str,
    manifest: Mapping[str, Any],
    calibration: Calibration,
    contents: Path,
    replace: bool = False,
) -> Bundle:
    """Write a bundle, completely or not at all.

    Args:
        folder: the bundle's folder; it appears by one rename, complete and checked.
        manifest: plain JSON values for all fields of `Manifest` except `format_version`, `version` and `files`.
        calibration: written as `calibration.npz`.
        contents: a folder with all other files: `stages/`, `README.md` and so on. It is copied.
        replace: replace a bundle that exists there.

    Raises:
        BundleError: `load_bundle` does not accept the result, or `folder` exists.
    """
    target = Path(folder)
    check_target(target, replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays within one file system.
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        given = (file.relative_to(contents).as_posix() for file in contents.rglob("*") if file.is_file())
        copy_files(contents, made, (file for file in given if file != MANIFEST))
        calibration.save(made / CALIBRATION)
        files = {
            file.relative_to(made).as_posix(): FileInfo(sha256=sha256_of(file), bytes=file.stat().st_size)
            for file in sorted(made.rglob("*"))
            if file.is_file()
        }
        complete = {
            **manifest,
            "format_version": FORMAT_VERSION,
            "version": files_digest(files),
            "files": {file: info.model_dump() for file, info in files.items()},
        }
        try:
            text = json.dumps(complete, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BundleError(target, MANIFEST, f"not plain JSON ({error})", "give plain finite values") from error
        (made / MANIFEST).write_text(text + "\n", encoding="utf-8")
        made.chmod(0o755)  # mkdtemp makes folders that only their owner may read
        try:
            load_bundle(made)
        except BundleError as error:
            raise BundleError(target, error.file, error.reason, "correct what is being written") from error
        _put_in_place(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return load_bundle(target, verify=False)


def copy_files(source: Path, target: Path, files: Iterable[str]) -> None:
    """Copy files, each named relative to the folder that it is in.

    The first error is raised as it is (`shutil.copytree` raises one that no longer tells that the disk is full).
    """
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)


def _put_in_place(made: Path, target: Path) -> None:
    """Move the bundle into place. An old one is renamed first, as a rename cannot replace it, and back on failure."""
    if not target.exists():
        made.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(aside / "bundle")
    try:
        made.rename(target)
    except OSError:
        (aside / "bundle").rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
