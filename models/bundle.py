"""A bundle: a folder with all that a server needs of a trained network, without executable code or unlisted files.

    manifest.json          a description of the network, and the size and sha256 of every other file
    calibration.npz        held-out scores and correctness, from which every exit policy is computed
    stages/stage_K.onnx    one graph per exit; they may refer to weights.safetensors
    weights.safetensors    (optional) the weights as trained
    stages_int8/stage_K.onnx, calibration_int8.npz
                           (optional) the same network in int8, weights included, and its own calibration
    README.md, frontier.png

Bundles are not trusted: sizes and digests are checked before anything is parsed, and a mismatch raises a `BundleError`
with the file, the reason and the fix. `models.bundle_writing` writes bundles. No torch here: the server imports this
module.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from models.calibration import CALIBRATION, CALIBRATION_INT8, MAX_CALIBRATION_BYTES, Calibration
from models.frontier import FAMILIES, Frontier, build_frontier
from models.gates import GATE_FEATURES, GateScore
from models.manifest import FORMAT_VERSION, FileInfo, Manifest
from models.predictor import FEATURES, Predictor
from models.scores import Score, plain_scores

ZOO = Path(__file__).with_name("zoo")  # the bundles that ship
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
MAX_MANIFEST_BYTES = 16 * 2**20  # the class names of the largest data sets take about 1 MiB
COPY_AGAIN = "copy or export the bundle again"
Precision = Literal["fp32", "int8"]


class BundleError(ValueError):
    """A bundle cannot be used; the message has the file, the reason and the fix."""

    def __init__(self, path: Path, file: str, reason: str, fix: str) -> None:
        super().__init__(f"{path / file if file else path}: {reason}; {fix}")
        self.path, self.file, self.reason, self.fix = path, file, reason, fix


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files have been checked against its manifest.

    Its stages, accuracies, scores and frontier are those of one precision. If there are int8 stages, `int8` is the
    bundle with theirs; name, version and costs are the same.
    """

    path: Path
    manifest: Manifest
    calibration: Calibration
    precision: Precision = "fp32"
    int8: "Bundle | None" = None

    def at(self, precision: Precision) -> "Bundle":
        """Return the bundle for a precision.

        Raises:
            BundleError: the bundle has no stages of that precision.
        """
        found = self if precision == self.precision else self.int8
        if found is None:
            fix = "make them with `python -m training quantize`, or serve it in fp32"
            raise BundleError(self.path, "", f"it has no {precision} stages", fix)
        return found

    def check_unchanged(self) -> None:
        """Check that the folder still contains this bundle, undamaged. To be called after opening its other files.

        Otherwise the stages of one bundle could be served with the thresholds of another, without any error.

        Raises:
            BundleError: the bundle was replaced or damaged meanwhile.
        """
        if load_bundle(self.path).at(self.precision).manifest != self.manifest:
            raise BundleError(self.path, "", "another bundle was put there while this one was opened", "start again")

    @property
    def costs_mflops(self) -> tuple[float, ...]:
        """The cumulative executed cost of leaving at each exit [N], which a server charges."""
        return tuple(exit_.executed_mflops for exit_ in self.manifest.exits)

    def frontier(self) -> Frontier:
        """Build the frontier of the manifest's score and family, with costs in millions of multiply-adds."""
        scores = self.calibration.scores[self.manifest.score]
        return build_frontier(scores, self.calibration.correct, self.costs_mflops, self.manifest.family)

    def score(self) -> Score:
        """Return the exit score to serve with, as the manifest defines it."""
        fitted = self.manifest.predictor
        if fitted is None:
            return plain_scores(len(self.manifest.exits))[self.manifest.score]
        if tuple(fitted.features) == GATE_FEATURES:
            return GateScore(fitted.gain)
        return Predictor(fitted.gain, fitted.loss)


def load_bundle(path: Path | str, verify: bool = True) -> Bundle:
    """Read and check a bundle.

    Args:
        path: the bundle's folder.
        verify: also check the digests. False skips this, but not the checks of sizes and contents: for bundles on a
            slow disk that have been verified before.

    Raises:
        BundleError: it is missing, damaged, not a bundle, of a newer format, or not readable for this user.
    """
    folder = Path(path)
    with _reading(folder, ""):
        is_folder, is_there = folder.is_dir(), folder.exists()
    if not is_folder:
        kind = "not a folder" if is_there else "there is no such folder"
        fix = "give the folder of a bundle, the one that holds manifest.json"
        if folder.name and (shipped := ZOO / folder.name).is_dir():  # users may copy the bare name from a model card
            fix = f"the bundle of that name that comes with ExitServe is {shipped}"
        raise BundleError(folder, "", kind, fix)
    manifest = _read_manifest(folder)
    for file, info in manifest.files.items():
        _check_file(folder, file, info, verify)
    _refuse_undeclared(folder, manifest)
    digest = files_digest(manifest.files)
    if manifest.version != digest:
        reason = f"version {manifest.version} does not belong to these files, whose digest is {digest}"
        raise BundleError(folder, MANIFEST, reason, COPY_AGAIN)
    _check_policy(folder, manifest)
    calibration = _read_calibration(folder, manifest, CALIBRATION)
    if manifest.int8 is None:
        return Bundle(folder, manifest, calibration)
    in_int8 = manifest.in_int8()
    _check_policy(folder, in_int8)
    int8 = Bundle(folder, in_int8, _read_calibration(folder, in_int8, CALIBRATION_INT8), "int8")
    return Bundle(folder, manifest, calibration, int8=int8)


def files_digest(files: Mapping[str, FileInfo]) -> str:
    """Return a bundle's version: 12 hex digits over the names, sizes and digests of all files but the manifest."""
    lines = [f"{file} {info.bytes} {info.sha256}\n" for file, info in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reading(folder: Path, file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "make it readable for this user (chmod -R a+rX)" if isinstance(error, PermissionError) else COPY_AGAIN
        raise BundleError(folder, file, f"it cannot be read ({error.strerror})", fix) from error


def _read_manifest(folder: Path) -> Manifest:
    path = _inside(folder, MANIFEST, "not a bundle, or an incomplete one")
    with _reading(folder, MANIFEST):
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(folder, MANIFEST, f"larger than {MAX_MANIFEST_BYTES} bytes", "not a bundle's manifest")
        text = path.read_bytes()
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(folder, MANIFEST, f"not JSON ({error})", COPY_AGAIN) from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(folder, MANIFEST, "it has no format_version", "this is not an ExitServe bundle")
    if version > FORMAT_VERSION:
        reason = f"format {version}, but this ExitServe reads formats up to {FORMAT_VERSION}"
        raise BundleError(folder, MANIFEST, reason, "update ExitServe, or export the bundle with this version")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        reason = f"{where + ': ' if where else ''}{first['msg']}{more}"
        raise BundleError(folder, MANIFEST, reason, "export the bundle again") from error


def _inside(folder: Path, file: str, if_missing: str) -> Path:
    """Return the path of a bundle's file, after checking that it is a regular file inside the bundle."""
    path = folder / file
    with _reading(folder, file):
        try:
            real = path.resolve(strict=True)
        except PermissionError:  # whether it exists is unknown
            raise
        except (OSError, RuntimeError) as error:
            raise BundleError(folder, file, f"missing: {if_missing}", COPY_AGAIN) from error
    if not real.is_relative_to(folder.resolve()):
        raise BundleError(folder, file, "a link to a file outside the bundle", "replace it by the file itself")
    if not real.is_file():
        raise BundleError(folder, file, "not a regular file", COPY_AGAIN)
    return path


def _check_file(folder: Path, file: str, info: FileInfo, verify: bool) -> None:
    path = _inside(folder, file, "the manifest lists it")
    with _reading(folder, file):
        size = path.stat().st_size
        if size != info.bytes:
            reason = f"{size} bytes, but the manifest says {info.bytes}"
            raise BundleError(folder, file, reason, f"it was truncated or changed: {COPY_AGAIN}")
        if verify and sha256_of(path) != info.sha256:
            raise BundleError(folder, file, "its sha256 differs from the manifest's", f"it was changed: {COPY_AGAIN}")


def _refuse_undeclared(folder: Path, manifest: Manifest) -> None:
    """Refuse files without a digest, except hidden ones, because a graph may refer to any file in the folder."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*names, *(name for name in folders if Path(root, name).is_symlink())]:
            file = Path(root, name).relative_to(folder).as_posix()
            if file not in manifest.files and file != MANIFEST and not name.startswith("."):
                raise BundleError(folder, file, "not listed in the manifest", "remove it, or export the bundle again")


def _read_calibration(folder: Path, manifest: Manifest, file: str) -> Calibration:
    if manifest.files[file].bytes > MAX_CALIBRATION_BYTES:
        raise BundleError(folder, file, f"larger than {MAX_CALIBRATION_BYTES} bytes", "hold out fewer images")
    try:
        calibration = Calibration.load(folder / file)
    except ValueError as error:
        raise BundleError(folder, file, str(error), "calibrate and export the bundle again") from error
    shape = (manifest.data.heldout_images, len(manifest.exits))
    if calibration.correct.shape != shape:
        reason = f"shape {calibration.correct.shape}, but the manifest says {shape[0]} images and {shape[1]} exits"
        raise BundleError(folder, file, reason, "calibrate and export the bundle again")
    known = {manifest.score} if manifest.predictor is not None else set(plain_scores(len(manifest.exits)))
    if manifest.score not in calibration.scores or manifest.score not in known:
        stored = ", ".join(sorted(set(calibration.scores) & known)) or "none"
        reason = f"score {manifest.score!r} is not among the calibrated scores known here ({stored})"
        raise BundleError(folder, MANIFEST, reason, "name one of them, or calibrate again")
    accuracy = calibration.correct.mean(axis=0)
    for number, (exit_, found) in enumerate(zip(manifest.exits, accuracy, strict=True), start=1):
        said = exit_.heldout_accuracy
        if abs(said - found) * shape[0] > 0.5:  # half an image: it may have been rounded when it was written
            reason = f"{found:.4f} of its answers at exit {number} are right where the manifest says {said:.4f}"
            raise BundleError(folder, file, reason, "calibrate and export the bundle again")
    return calibration


def _check_policy(folder: Path, manifest: Manifest) -> None:
    """Check that this version knows the family of thresholds and the features of a fitted score."""
    if manifest.family is not None and manifest.family not in FAMILIES:
        reason = f"unknown family of thresholds {manifest.family!r}; known: {', '.join(FAMILIES)}"
        raise BundleError(folder, MANIFEST, reason, "update ExitServe, or evaluate and export the bundle again")
    fitted = manifest.predictor
    known = (FEATURES, GATE_FEATURES)
    if fitted is not None and (tuple(fitted.features) not in known or len(fitted.gain) != len(manifest.exits)):
        reason = f"its predictor is not one for {len(manifest.exits)} exits with the features {', '.join(FEATURES)}"
        reason += f", or {', '.join(GATE_FEATURES)}"
        raise BundleError(folder, MANIFEST, reason, "update ExitServe, or evaluate and export the bundle again")
    if fitted is not None and tuple(fitted.features) == GATE_FEATURES and fitted.loss is not None:
        raise BundleError(folder, MANIFEST, "gates have no `loss`", "export the bundle again")
    if fitted is not None and manifest.score in plain_scores(1):
        reason = f"score {manifest.score!r} is not fitted, but there is a predictor"
        raise BundleError(folder, MANIFEST, reason, "evaluate and export the bundle again")
