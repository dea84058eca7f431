"""Stage times as `python -m service plan` measures them. On a busy machine one row may take as long as 16."""

from pathlib import Path

import pytest

from models.bundle import load_bundle
from service.plan import host_times
from service.plan.measuring import measure
from tests.bundles import tiny_bundle


def test_a_stages_time_grows_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_times, "HOST_S", 0.1)  # not examined here
    times = measure(load_bundle(tiny_bundle(tmp_path / "tiny")), 1, 16, limit_s=0.5)
    assert times.alone_speed == 1.0
    for stage in range(4):
        assert 0 < times.seconds(stage, 1) < times.seconds(stage, 16) < times.seconds(stage, 64)
