"""`calibration.npz`: held-out scores and correctness by exit, from which thresholds and frontiers are computed.

The file is not trusted: sizes are bounded and headers checked before anything is allocated, and pickle is disabled.
"""

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

CALIBRATION, CALIBRATION_INT8 = "calibration.npz", "calibration_int8.npz"
# Both compressed and uncompressed; a million images with ten exits and two scores take 90 million.
MAX_CALIBRATION_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 4096
MAX_MEMBERS = 64
CORRECT = "correct"
PREFIX = "scores_"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores and correctness of N exits on M images that the network was not trained on.

    Raises:
        ValueError: the arrays do not match, or a score is NaN or +inf (-inf: the image never leaves there).
    """

    scores: Mapping[str, NDArray[np.float32]]  # by name of the exit score: [M, N], higher is more confident
    correct: NDArray[np.bool_]  # [M, N]: whether the exit's answer is the label

    def __post_init__(self) -> None:
        if self.correct.dtype != np.bool_ or self.correct.ndim != 2 or 0 in self.correct.shape:
            raise ValueError(f"`correct` must be bool [images, exits], not {self.correct.dtype} {self.correct.shape}")
        if self.correct.view(np.uint8).max() > 1:
            raise ValueError("`correct` contains bytes other than 0 and 1")
        if not self.scores:
            raise ValueError("it contains no scores")
        for name, values in self.scores.items():
            if values.dtype != np.float32 or values.shape != self.correct.shape:
                raise ValueError(
                    f"scores {name!r} must be float32 {self.correct.shape} like `correct`, "
                    f"not {values.dtype} {values.shape}"
                )
            if not (values < np.inf).all():
                raise ValueError(f"scores {name!r} contain NaN or +inf")

    def save(self, path: Path) -> None:
        """Write the file, the same bytes for the same numbers: a bundle's version must not depend on the time."""
        arrays: dict[str, NDArray[Any]] = {CORRECT: self.correct}
        arrays |= {f"{PREFIX}{name}": values for name, values in sorted(self.scores.items())}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, values in arrays.items():
                packed = io.BytesIO()
                npy.write_array(packed, np.ascontiguousarray(values), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), packed.getvalue(), zipfile.ZIP_DEFLATED)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read and check a file written by `save` (or `numpy.savez`).

        Raises:
            ValueError: the file is damaged, too large, or not a calibration; the message gives the cause.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                _check_members(archive)
                # Not `np.load`, which goes by the first bytes: a zip archive may follow other data.
                loaded = {member.filename.removesuffix(".npy"): _read(archive, member) for member in archive.infolist()}
        except ValueError:
            raise
        except Exception as error:  # for damaged files zipfile, its decompressors and numpy raise many types
            raise ValueError(f"not a readable npz file ({error})") from error
        correct = loaded.pop(CORRECT)
        return cls({name.removeprefix(PREFIX): values for name, values in loaded.items()}, correct)


def _check_members(archive: zipfile.ZipFile) -> None:
    """Refuse unexpected members, and arrays whose header does not match their size."""
    members = archive.infolist()
    names = [member.filename.removesuffix(".npy") for member in members]
    if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > MAX_CALIBRATION_BYTES:
        raise ValueError(f"it decompresses to more than {MAX_MEMBERS} arrays or {MAX_CALIBRATION_BYTES} bytes")
    if len(set(names)) != len(names) or CORRECT not in names:
        raise ValueError(f"it must contain `{CORRECT}` once and scores with distinct names, not {names}")
    for name, member in zip(names, members, strict=True):
        if name != CORRECT and not name.startswith(PREFIX):
            raise ValueError(f"{member.filename!r} is neither `{CORRECT}` nor `{PREFIX}...`")
        with archive.open(member) as file:
            shape, fortran_order, dtype = _read_header(file, member.filename)
            n_bytes = math.prod(shape) * dtype.itemsize
            if dtype.hasobject or fortran_order or file.tell() + n_bytes != member.file_size:
                raise ValueError(f"{member.filename!r}: its header does not describe its {member.file_size} bytes")


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        return npy.read_array(file, allow_pickle=False, max_header_size=MAX_HEADER_BYTES)


def _read_header(file: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{name!r}: npy version {version}, but only 1.0 is supported")
    return npy.read_array_header_1_0(file, max_header_size=MAX_HEADER_BYTES)
