"""The metrics page: its counts equal the answers, its size is bounded, and it contains nothing from clients."""

import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.bundle import Bundle
from service.metrics import Metrics, _cost_bounds
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
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
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
