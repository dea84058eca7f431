"""The text of a plan: the numbers that a person reads, with their units."""

from dataclasses import replace

import numpy as np
import pytest

from service.plan.planning import Outcome, Replicas
from service.plan.report import Plan
from service.plan.simulation import Setup
from service.plan.stage_times import StageTimes

TIMES = StageTimes(
    network="two-exits in fp32",
    machine="none: chosen by a test",
    n_lanes=2,
    n_cores=2,
    lanes_take_cores=True,
    stage_seconds=[{1: 0.001}] * 2,
    copy_row_seconds=[0.0] * 2,
    host_image_seconds=0.0,
    host_batch_seconds=0.0,
)
SATURATED = Outcome(
    images=4_000,
    images_per_s=1_000.0,
    p50_ms=100.0,
    p95_ms=110.0,
    p99_ms=120.0,
    batch_rows=(31.5, 16.25),
    mean_mflops=19.8,
    worst_mflops=20.5,
    shares=(0.625, 0.375),
    cut_short=0.0,
    accuracy=0.725,
    latencies_ms=np.zeros(0),
)
AT_RATE = replace(SATURATED, p50_ms=5.04, p95_ms=8.0, p99_ms=9.96, mean_mflops=20.2, cut_short=0.0125)
PLAN = Plan(
    network="two-exits in fp32",
    full_mflops=50.0,
    setup=Setup(budget_mflops=20.0, n_lanes=2, n_cores=2, http_image_s=110e-6),
    times=TIMES,
    rate_per_s=2_400.0,
    n_replicas=3,
    at_once=1,
    seed=0,
    saturated=SATURATED,
    at_rate=AT_RATE,
    for_latency=Replicas(10.0, 3, 9.96),
)


def test_a_plan_tells_what_to_expect() -> None:
    assert list(PLAN.lines()) == [
        "two-exits in fp32: a budget of 20 of 50 MFLOPs per image (40%), 2 lanes, batches of up to 32, policy default",
        "times of two-exits in fp32 on none: chosen by a test; 110 us per image for HTTP and decoding",
        "",
        "one replica can do          1,000 images/s; 3: 3,000",
        "requested                   2,400 images/s: 800 per replica, 80% of what it can do",
        "latency                     p50 5.0 ms, p95 8.0 ms, p99 10.0 ms",
        "rows per batch, by stage    31.5  16.2",
        "exit shares, %              62.5  37.5",
        "spent                       20.20 MFLOPs per image, 1.0% over the budget; the costliest 1,000 in a row 20.50",
        "cut short by the ledger     1.2% of the images",
        "expected accuracy           72.5%, on held-out images",
        "replicas to keep up         3",
        "replicas for p99 <= 10 ms   3 (p99 10.0 ms)",
    ]
    assert not PLAN.is_overloaded


def test_an_overload_is_told_per_replica() -> None:
    overloaded = replace(PLAN, rate_per_s=3_600.0, at_rate=None, for_latency=Replicas(0.5, None, 1.25))
    assert overloaded.load == pytest.approx(1.2)
    lines = list(overloaded.lines())
    assert "OVERLOAD: every replica's queue grows by 200 images per second, until it refuses (429). " in lines[6]
    assert (
        "spent                       19.80 MFLOPs per image, 1.0% under the budget; the costliest 1,000 in a row 20.50"
        in lines
    )
    assert lines[-2:] == [
        "replicas to keep up         4",
        "replicas for p99 <= 0.5 ms  no number is enough: an idle replica's p99 is 1.2 ms",
    ]
    near = replace(PLAN, rate_per_s=2_880.0)
    assert any("near capacity" in line for line in near.lines())
