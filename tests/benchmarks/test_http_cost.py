"""The cost of HTTP is measured with a server whose null network answers every request."""

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.http_cost import main
from tests.bundles import tiny_bundle

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux' /proc")


def test_the_command_measures_requests_and_the_event_loop(tmp_path: Path) -> None:
    app = Typer()
    app.command()(main)
    out = tmp_path / "cost.json"
    arguments = ["--bundle", str(tiny_bundle(tmp_path / "tiny")), "--seconds", "0.5", "--rounds", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "SAMPLE PICTURES" in done.output
    (cost,) = json.loads(out.read_text())
    assert cost["requests_per_s"] > 0
    assert cost["engine_us"] > 0
    assert cost["http_us"][0] > 0
    assert 0 < cost["longest_work_ms"][0] < 60_000
    assert cost["longest_gap_ms"][0] > 0
