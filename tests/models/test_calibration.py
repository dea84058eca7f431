"""Calibrations: written reproducibly, and forged ones are refused."""

import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.bundle import BundleError
from models.calibration import Calibration
from tests.bundles import refusal, seal


@pytest.mark.parametrize("seed", [0, 1])
def test_calibrations_are_written_reproducibly(tmp_path: Path, seed: int) -> None:
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


def npy(values: np.ndarray, **save: Any) -> bytes:
    packed = BytesIO()
    np.lib.format.write_array(packed, values, **save)
    return packed.getvalue()


def forge(path: Path, members: dict[str, bytes]) -> BundleError:
    """Refusal of a bundle whose calibration has these members and which is otherwise valid."""
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


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"correct.npy": npy(np.array([{}]), allow_pickle=True)}, "does not describe"),
        ({"correct.npy": lying_header((10**9, 10**9), "|b1")}, "does not describe"),
        ({"correct.npy": lying_header((-8, -8), "|b1")}, ""),
        ({"correct.npy": lying_header((64,), "|O")}, "does not describe"),
        ({"correct.npy": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000}, ""),
        ({"correct.npy": header("{'descr': (")}, "not a readable npz"),
        ({"correct.npy": header("{[]: 1}")}, "not a readable npz"),
        ({"correct.npy": header("{'descr': ('|b1',), 'fortran_order': False, 'shape': (8, 8)}")}, "not a readable npz"),
        ({"correct.npy": b"\x93NUMPY\x03\x00" + b" " * 100}, "npy version"),
        ({"correct.npy": b"pickled?"}, ""),
        ({"correct.npy": npy(np.full((2000, 4), 2, dtype=np.uint8)).replace(b"|u1", b"|b1")}, "other than 0 and 1"),
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
    assert "must contain `correct`" in forge(bundle_path, {"scores_a.npy": members["scores_logit_margin.npy"]}).reason
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
    assert "decompresses to more than" in forge(bundle_path, good_members() | {"scores_bomb.npy": bomb}).reason
    assert (bundle_path / "calibration.npz").stat().st_size < 2**20


def test_a_file_above_the_limit_is_refused_before_it_is_opened(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list of members alone might fill the memory."""
    monkeypatch.setattr("models.bundle.MAX_CALIBRATION_BYTES", 1000)
    assert refusal(bundle_path).reason == "larger than 1000 bytes"


def test_a_zip_that_understates_its_sizes_is_refused(bundle_path: Path) -> None:
    path = bundle_path / "calibration.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in good_members().items():
            archive.writestr(name, member)
    true_size = struct.pack("<I", len(good_members()["correct.npy"]))
    assert path.read_bytes().count(true_size) == 2  # in the local header and in the central directory
    path.write_bytes(path.read_bytes().replace(true_size, struct.pack("<I", 200)))
    seal(bundle_path)
    assert refusal(bundle_path).file == "calibration.npz"


def test_the_archive_that_is_read_is_the_one_checked_even_after_prepended_data(tmp_path: Path) -> None:
    """For example an array that claims 8 EiB, which numpy's reader would believe."""
    path = tmp_path / "calibration.npz"
    Calibration({"max_softmax": np.ones((2, 3), np.float32)}, np.ones((2, 3), bool)).save(path)
    path.write_bytes(lying_header((2**63 - 1,), "|b1") + path.read_bytes())
    assert Calibration.load(path).correct.all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_calibration_raises_value_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "calibration.npz"
    scores = np.arange(12, dtype=np.float32).reshape(3, 4)
    packing = data.draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("correct.npy", npy(scores > 5))
        archive.writestr("scores_max_softmax.npy", npy(scores))
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
    try:
        loaded = Calibration.load(path)
    except ValueError:
        return
    assert loaded.correct.dtype == np.bool_
