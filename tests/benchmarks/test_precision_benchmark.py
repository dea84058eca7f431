"""The benchmark of precisions times every stage in both."""

import re
from math import isfinite
from pathlib import Path

import pytest

from benchmarks import precision
from benchmarks.precision import main, stage_seconds
from models.bundle import load_bundle
from tests.bundles import tiny_int8_bundle


def test_every_stage_of_both_is_timed(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_int8_bundle(tmp_path / "bundle"))
    best = stage_seconds([bundle, bundle.at("int8")], n_rows=3, n_runs=2)
    assert [len(times) for times in best] == [4, 4]
    assert all(seconds > 0 and isfinite(seconds) for times in best for seconds in times)


def test_times_are_told_per_image_and_float_ones_in_multiples_of_int8s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "stage_seconds", lambda *_: [[0.008, 0.012], [0.002, 0.006]])
    main(tiny_int8_bundle(tmp_path / "bundle"), rows=[4], runs=1)
    rows = [re.findall(r"[\w.]+", line) for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert rows == [
        ["1", "2.000", "0.500", "4.00"],
        ["2", "3.000", "1.500", "2.00"],
        ["all", "5.000", "2.000", "2.50"],
    ]
