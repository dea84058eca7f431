"""The metrics page: its counts equal the answers, its size is bounded, and it contains nothing from clients."""

import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.bundle import Bundle
from service.budget.latency import LatencyState
from service.budget.state import BudgetState
from service.engine.observer import EngineStats
from service.metrics import REASONS, Metrics, _cost_bounds
from tests.bundles import random_images, tiny_bundle
from tests.service.apps import PNG, Http, build_app, png, serving

N_IMAGES = 80
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[Http]:
    with serving(build_app(folder, max_body_bytes=50_000)) as client:
        yield client


def scrape(http: Http) -> Samples:
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(response.text)


def parsed(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples["exitserve_" + name, frozenset(labels.items())]


def test_counts_equal_the_answers(http: Http) -> None:
    before = scrape(http)
    bodies = [png(image) for image in random_images(N_IMAGES, seed=31)]
    answers = [response.json() for response in http.post_all("/classify", bodies, 16, headers=PNG)]
    http.post("/classify", content=b"no image", headers=PNG)
    http.post("/classify", content=bytes(60_000), headers=PNG)
    samples = scrape(http)

    def grown(name: str, **labels: str) -> float:
        return value(samples, name, **labels) - value(before, name, **labels)

    taken = Counter((answer["exit"], answer["reason"]) for answer in answers)
    assert len({exit_ for exit_, _ in taken}) > 1
    for exit_ in range(1, 5):
        for reason in ("confident", "final", "budget"):
            assert grown("exits_total", exit=str(exit_), reason=reason) == taken[exit_, reason]
        answered_there = sum(count for (number, _), count in taken.items() if number == exit_)
        assert grown("request_seconds_count", exit=str(exit_)) == answered_there
        ran = sum(count for (number, _), count in taken.items() if number >= exit_)
        assert grown("batch_rows_sum", stage=str(exit_)) == ran
        assert grown("queue_seconds_count", stage=str(exit_)) == ran
        assert grown("stage_seconds_count", stage=str(exit_)) == grown("batch_rows_count", stage=str(exit_)) <= ran
        assert value(samples, "queue_rows", stage=str(exit_)) == 0
    assert grown("requests_total", outcome="answered") == N_IMAGES
    assert grown("requests_total", outcome="invalid") == 2
    assert grown("request_mflops_count") == N_IMAGES
    spent = sum(answer["mflops"] for answer in answers)
    assert grown("request_mflops_sum") == pytest.approx(spent)
    assert grown("mflops_total") == pytest.approx(spent)
    assert grown("decode_seconds_count") == N_IMAGES
    assert value(samples, "in_flight_rows") == 0


def test_every_exit_has_a_bucket_of_its_own(http: Http) -> None:
    bodies = [png(image) for image in random_images(40, seed=32)]
    before = scrape(http)
    answers = [response.json() for response in http.post_all("/classify", bodies, 8, headers=PNG)]
    after = scrape(http)
    buckets = sorted(
        (float(dict(labels)["le"]), count - before[name, labels])
        for (name, labels), count in after.items()
        if name == "exitserve_request_mflops_bucket"
    )
    for (_, cumulative), exit_ in zip(buckets, range(1, 5), strict=False):
        assert cumulative == sum(answer["exit"] <= exit_ for answer in answers)


def test_gauges_equal_the_budgets_state(http: Http) -> None:
    state = http.put("/budget", json={"fraction": 0.45}).json()
    samples = scrape(http)
    assert value(samples, "budget_mflops") == pytest.approx(state["average_mflops"])
    assert value(samples, "threshold", exit="4") == float("-inf")
    assert value(samples, "full_mflops") == state["allowed"]["average_mflops"]["highest"]
    assert value(samples, "burst_images") == state["ledger"]["burst_images"] >= 32
    shares = [value(samples, "expected_share", exit=str(exit_)) for exit_ in range(1, 5)]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx(state["expected"]["exit_shares"], abs=0.05)
    assert value(samples, "expected_accuracy") == pytest.approx(state["accuracy"], abs=0.02)
    [info] = [dict(labels) for name, labels in samples if name == "exitserve_model_info"]
    model = http.get("/model").json()
    assert (info["name"], info["version"]) == (model["name"], model["version"])


STATS = EngineStats(
    submitted=1001,
    answered=1002,
    refused=1003,
    abandoned=1004,
    failed=1005,
    in_flight_rows=1006,
    queued_rows=(1007, 1008, 1009, 1010),
    running_batches=1011,
    failed_batches=1012,
    hung_batches=1013,
    max_batch_rows=(1014, 1015, 1016, 1017),
    room_rows=1018,
    predicted_wait_s=1019.5,
    exits={(2, "budget"): 1020, (4, "final"): 1021},
    idle_mflops=1022.5,
    latency_limited_s=1023.5,
)
LATENCY = LatencyState(target_s=2001.5, p95_s=2002.5, n_answers=2003, limited_s=2004.5, is_lowest=True)
BUDGET = BudgetState(
    budget_mflops=3001.5,
    fraction=3002.5,
    working_mflops=3003.5,
    burst_images=3004.5,
    position=3005.5,
    thresholds=(3006.5, 3007.5, 3008.5, float("-inf")),
    expected_mflops=3009.5,
    expected_accuracy=3010.5,
    expected_shares=(3011.5, 3012.5, 3013.5, 3014.5),
    frontier_limited=True,
    rolling_mflops=3015.5,
    settled_mflops=3016.5,
    reserved_mflops=3017.5,
    answered=3018,
    abandoned=3019,
    spent_answered_mflops=3020.5,
    spent_abandoned_mflops=3021.5,
    latency=LATENCY,
)
OF_THE_ENGINE = {
    "mflops_total": 3020.5,
    "failed_batches_total": 1012,
    "hung_batches_total": 1013,
    "latency_limited_seconds_total": 1023.5,
    "budget_mflops": 3001.5,
    "working_mflops": 3003.5,
    "latency_target_seconds": 2001.5,
    "latency_p95_seconds": 2002.5,
    "latency_limited": 1,
    "latency_at_lowest": 1,
    "burst_images": 3004.5,
    "rolling_mflops": 3015.5,
    "expected_mflops": 3009.5,
    "expected_accuracy": 3010.5,
    "saved_mflops": 3016.5,
    "in_flight_rows": 1006,
    "room_rows": 1018,
    "predicted_wait_seconds": 1019.5,
}


def test_every_metric_of_engine_and_budget_has_its_own_number(bundle: Bundle) -> None:
    metrics = Metrics(bundle.manifest)
    metrics.watch(lambda: STATS, lambda: BUDGET, bundle)
    samples = parsed(metrics.exposition(is_ready=True)[0].decode())
    assert {name: value(samples, name) for name in OF_THE_ENGINE} == OF_THE_ENGINE
    for i, number in enumerate(("1", "2", "3", "4")):
        assert value(samples, "threshold", exit=number) == BUDGET.thresholds[i]
        assert value(samples, "expected_share", exit=number) == BUDGET.expected_shares[i]
        assert value(samples, "queue_rows", stage=number) == STATS.queued_rows[i]
        assert value(samples, "max_batch_rows", stage=number) == STATS.max_batch_rows[i]
        for reason in REASONS:
            assert value(samples, "exits_total", exit=number, reason=reason) == STATS.exits.get((i + 1, reason), 0)


def test_what_there_is_not_yet_is_no_number(bundle: Bundle) -> None:
    """So that a panel shows a gap, and no alert sees a zero."""
    metrics = Metrics(bundle.manifest)
    metrics.watch(lambda: STATS, lambda: replace(BUDGET, rolling_mflops=None, latency=None), bundle)
    samples = parsed(metrics.exposition(is_ready=True)[0].decode())
    for name in ("rolling_mflops", "latency_target_seconds", "latency_p95_seconds"):
        assert isnan(value(samples, name)), name
    assert value(samples, "latency_limited") == value(samples, "latency_at_lowest") == 0


def test_histograms_count_in_their_units(bundle: Bundle) -> None:
    metrics = Metrics(bundle.manifest)
    metrics.batch_ran(2, 0.004, [0.004, 0.3, 2.0])
    metrics.responded(3, 0.004)
    metrics.responded(3, 0.3)
    metrics.decoded(0.00015)
    samples = parsed(metrics.exposition(is_ready=True)[0].decode())
    for name, labels, (below, at_most), expected in (
        ("stage_seconds", {"stage": "2"}, ("0.002", "0.005"), (0, 1, 1, 0.004)),
        ("queue_seconds", {"stage": "2"}, ("0.25", "0.5"), (1, 2, 3, 2.304)),
        ("batch_rows", {"stage": "2"}, ("2.0", "3.0"), (0, 1, 1, 3)),
        ("request_seconds", {"exit": "3"}, ("0.002", "0.005"), (0, 1, 2, 0.304)),
        ("decode_seconds", {}, ("0.0001", "0.0002"), (0, 1, 1, 0.00015)),
    ):
        counted = (
            value(samples, f"{name}_bucket", le=below, **labels),
            value(samples, f"{name}_bucket", le=at_most, **labels),
            value(samples, f"{name}_count", **labels),
            value(samples, f"{name}_sum", **labels),
        )
        assert counted == pytest.approx(expected), name


def test_client_input_creates_no_new_series(http: Http) -> None:
    before = set(scrape(http))
    for word in ("x" * 50, "exit", "../../etc"):
        http.post(f"/classify?{word}={word}", content=word.encode(), headers={"Content-Type": f"image/{word}"})
        http.get(f"/{word}", headers={"X-Request-ID": word, "User-Agent": word})
    assert set(scrape(http)) == before


def test_no_histogram_has_more_than_16_buckets(http: Http) -> None:
    buckets = Counter(
        (name, frozenset(label for label in labels if label[0] != "le"))
        for name, labels in scrape(http)
        if name.endswith("_bucket")
    )
    assert buckets
    assert max(buckets.values()) <= 16
    names = {name for name, _ in scrape(http)}
    assert all(name.startswith(("exitserve_", "process_")) for name in names)


def test_the_process_is_measured_too(http: Http) -> None:
    samples = {name: measured for (name, _), measured in scrape(http).items()}
    assert 10e6 < samples["process_resident_memory_bytes"] < 100e9
    assert 0 < samples["process_open_fds"] < samples["process_max_fds"]
    assert samples["process_cpu_seconds_total"] > 0


def test_the_process_is_known_to_have_no_file_left(bundle: Bundle) -> None:
    """Counting them takes one."""
    metrics = Metrics(bundle.manifest)
    n_files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
    try:
        text, _ = metrics.exposition(is_ready=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_files, most))
    assert {"process_open_fds 3.0", "process_max_fds 3.0"} <= set(text.decode().splitlines())


@pytest.mark.parametrize("n_exits", [1, 2, 15, 16, 31, 256])
def test_cost_bounds_are_few_and_end_at_the_last_exit(n_exits: int) -> None:
    costs = [10.0 * (i + 1) for i in range(n_exits)]
    bounds = _cost_bounds(costs)
    assert len(bounds) <= 15
    assert bounds == sorted(set(bounds))
    assert bounds[-1] >= costs[-1]
    if n_exits <= 15:
        for cost, bound in zip(costs, bounds, strict=True):
            assert cost <= bound < cost + 10


def test_exits_that_cost_nearly_the_same_share_a_bucket() -> None:
    assert _cost_bounds([100.02, 100.06, 200.0]) == [100.1, 200.1]


def test_it_can_be_scraped_before_the_engine_has_started(tmp_path: Path) -> None:
    with serving(build_app(tiny_bundle(tmp_path / "bundle")), ready=False) as http:
        text = http.get("/metrics").text
        assert "exitserve_requests_total" in text
        assert "exitserve_ready 0.0" in text


def test_the_ready_gauge_is_set(http: Http) -> None:
    assert value(scrape(http), "ready") == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_prometheus_own_linter_finds_nothing(http: Http) -> None:
    http.post("/classify", content=png(random_images(1, seed=32)[0]), headers=PNG)
    told = subprocess.run(
        ["promtool", "check", "metrics"], input=http.get("/metrics").text, capture_output=True, text=True, timeout=60
    )
    assert (told.returncode, told.stdout + told.stderr) == (0, "")
