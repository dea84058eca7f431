"""The check of the planner runs from its command line. Its accuracy is measured on an idle machine, not here."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import plan_check
from benchmarks.plan_check import Pair, Stream, main, mean_of
from service.errors import EngineError
from service.plan import host_times, planning
from service.plan.stage_times import StageTimes
from tests.bundles import tiny_bundle


def test_the_command_predicts_and_serves(tmp_path, monkeypatch):
    for name in ("SETTLING_IMAGES", "SATURATED_IMAGES"):
        monkeypatch.setattr(planning, name, 300)
    monkeypatch.setattr(host_times, "HOST_S", 0.1)
    monkeypatch.setattr(plan_check, "LOADS", (0.2,))  # low enough for any machine
    monkeypatch.setattr(plan_check, "SETTLING_S", 0.2)
    app = Typer()
    app.command()(main)
    out = tmp_path / "check.json"
    arguments = ["--bundle", str(tiny_bundle(tmp_path / "tiny")), "--fraction", "0.7", "--images", "200"]
    arguments += ["--seconds", "0.5", "--rounds", "1", "--lanes", "2", "--max-rows", "4", "--json", str(out)]
    done = CliRunner(env={"EXITSERVE_DATA": ""}).invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "images/s at saturation" in done.output
    assert "SYNTHETIC" in done.output
    [pairs] = json.loads(out.read_text())
    assert [pair["what"] for pair in pairs] == [
        "images/s at saturation",
        "p50 at 20% load, ms",
        "p99 at 20% load, ms",
    ]
    assert all(pair["predicted"] > 0 and pair["live"] > 0 for pair in pairs)


def test_an_image_that_is_not_answered_ends_the_stream():
    class Failing:
        """An engine that answers nothing."""

        def submit_to(self, sink, token, image):
            try:
                sink([(token, EngineError("the device is lost"))])
            except EngineError:
                pytest.fail("on the engine's thread it would end that, and nobody would hear of it")

    with pytest.raises(EngineError, match="the device is lost"):
        Stream(Failing(), [None]).run([0.0, 0.0, 0.001])


def test_latencies_count_from_when_images_were_due_once_the_stream_has_settled(monkeypatch):
    """On a clock that only waiting and the engine move: the image of the first second takes 500 ms, others 1 to 100,
    and the last two are due together, so that the second of them is late."""

    class Clock:
        now_s = 100.0

        def sleep(self, seconds):
            self.now_s += seconds

    class Serving:
        def submit_to(self, sink, due_s, image):
            clock.now_s += next(latencies_s)
            sink([(due_s, object())])

    clock, latencies_s = Clock(), iter([0.5, *(i / 1e3 for i in range(1, 101)), 0.02])
    monkeypatch.setattr(
        plan_check,
        "time",
        SimpleNamespace(perf_counter=lambda: clock.now_s, thread_time=lambda: clock.now_s / 10, sleep=clock.sleep),
    )
    settled_s = plan_check.SETTLING_S
    arrivals_s = [0.0, *(settled_s + i for i in range(100)), settled_s + 99.0]
    stream = Stream(Serving(), [None])
    p50_ms, p99_ms = stream.run(arrivals_s)
    found_ms = [*range(1, 101), 120]  # the last waited 100 ms for the one before
    assert (p50_ms, p99_ms) == pytest.approx(np.percentile(found_ms, [50, 99]).tolist())
    assert p99_ms == pytest.approx(100)
    assert stream.sender_s == pytest.approx((settled_s + 99.12) / 10 / 102)


def test_the_error_is_relative_to_the_measured_value():
    assert Pair("x", 90.0, 100.0).error == pytest.approx(-0.1)


def test_the_mean_of_two_tables_is_their_mean():
    tables = [
        StageTimes(
            network="a",
            machine="none: chosen by a test",
            n_lanes=2,
            n_cores=2,
            lanes_take_cores=True,
            alone_speed=speed,
            stage_seconds=[{1: seconds, 4: 3 * seconds}],
            copy_row_seconds=[seconds],
            host_image_seconds=seconds,
            host_batch_seconds=0.0,
            wake_seconds=(seconds, 2 * seconds),
        )
        for speed, seconds in ((1.0, 0.001), (2.0, 0.003))
    ]
    mean = mean_of(tables)
    assert (mean.alone_speed, mean.host_image_seconds) == pytest.approx((1.5, 0.002))
    assert mean.wake_seconds == pytest.approx((0.002, 0.004))
    assert mean.copy_row_seconds == pytest.approx((0.002,))
    assert mean.seconds(0, 4) == pytest.approx(0.006)
