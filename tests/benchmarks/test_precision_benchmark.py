"""The benchmark of precisions times every stage in both."""

from math import isfinite
from pathlib import Path

from benchmarks.precision import stage_seconds
from models.bundle import load_bundle
from tests.bundles import tiny_int8_bundle


def test_every_stage_of_both_is_timed(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_int8_bundle(tmp_path / "bundle"))
    best = stage_seconds([bundle, bundle.at("int8")], n_rows=3, n_runs=2)
    assert [len(times) for times in best] == [4, 4]
    assert all(seconds > 0 and isfinite(seconds) for times in best for seconds in times)
