"""`/budget`: set in three ways, and refused with its range."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import inf
from pathlib import Path
from typing import Any

import orjson
import pytest

from models.bundle import Bundle
from service.api.budget import _answer
from service.budget.latency import LatencyState
from service.budget.state import BudgetState
from service.budget.target import Keeper, Target, Targets
from tests.bundles import random_images
from tests.service.apps import PNG, Http, build_app, png, problem, serving
from tests.waiting import LIMIT_S, wait_until

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[Http]:
    with serving(build_app(folder)) as client:
        yield client


def test_the_budget_is_reported_in_three_ways(http: Http) -> None:
    full = http.get("/model").json()["exits"][-1]["executed_mflops"]
    state = http.put("/budget", json={"fraction": 0.5}).json()
    assert state["average_mflops"] == pytest.approx(0.5 * full, rel=1e-5)
    assert state["fraction"] == pytest.approx(0.5, rel=1e-5)
    assert 0 < state["accuracy"] < 1
    assert state["set_as"] == "fraction"
    assert state["expected"]["average_mflops"] == pytest.approx(state["average_mflops"], rel=1e-3)
    assert sum(state["expected"]["exit_shares"]) == pytest.approx(1)
    assert len(state["thresholds"]) == 4
    assert state["thresholds"][-1] is None
    assert not state["frontier_ends_below_budget"]
    assert http.get("/budget").json()["average_mflops"] == state["average_mflops"]

    by_mflops = http.put("/budget", json={"average_mflops": state["average_mflops"]}).json()
    assert by_mflops["set_as"] == "average_mflops"
    assert by_mflops["expected"] == state["expected"]

    by_accuracy = http.put("/budget", json={"accuracy": state["accuracy"]}).json()
    assert by_accuracy["set_as"] == "accuracy"
    assert by_accuracy["accuracy"] >= state["accuracy"] - 1e-9
    assert by_accuracy["average_mflops"] <= state["average_mflops"] * 1.001


@pytest.mark.parametrize("kind", ["average_mflops", "fraction", "accuracy"])
def test_the_reported_limits_are_accepted_and_values_beyond_are_not(http: Http, kind: str) -> None:
    allowed = http.get("/budget").json()["allowed"][kind]
    for value in allowed.values():
        assert http.put("/budget", json={kind: value}).status_code == 200
    before = http.get("/budget").json()["average_mflops"]
    for value in (allowed["lowest"] * 0.99, allowed["highest"] * 1.01, 0, -1, 1e300):
        document = problem(http.put("/budget", json={kind: value}), 422, "budget-out-of-range")
        assert document["allowed"] == allowed
        assert kind in document["detail"]
        lowest, highest = document["detail"].rstrip(".").split("from ")[1].split(" to ")
        for shown in (lowest, highest):  # the advice in the message works
            assert http.put("/budget", json={kind: float(shown)}).status_code == 200
        http.put("/budget", json={"average_mflops": before})
    assert http.get("/budget").json()["average_mflops"] == before


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 400, "broken-json"),
        (b"", 400, "broken-json"),
        (b"\xff\xfe", 400, "broken-json"),
        (b"[" * 5000, 400, "broken-json"),
        (b"[]", 422, "bad-budget"),
        (b"40", 422, "bad-budget"),
        (b"{}", 422, "bad-budget"),
        (b'{"fraction": null}', 422, "bad-budget"),
        (b'{"fraction": "0.4"}', 422, "bad-budget"),
        (b'{"fraction": true}', 422, "bad-budget"),
        (b'{"fraction": 0.4, "accuracy": 0.7}', 422, "bad-budget"),
        (b'{"share": 0.4}', 422, "bad-budget"),
        (b'{"fraction": 0.4, "x": 1}', 422, "bad-budget"),
        (b'{"fraction": NaN}', 422, "bad-budget"),
        (b'{"fraction": -Infinity}', 422, "bad-budget"),
        (b'{"fraction": 1e999}', 422, "bad-budget"),
        (b'{"fraction": 0.5, "fraction": 0.9}', 422, "bad-budget"),
        (b'{"fraction": 0.5, "latency_ms": 50, "latency_ms": null}', 422, "bad-budget"),
        (b'{"fraction": 40}', 422, "budget-out-of-range"),
        (b'{"latency_ms": null}', 422, "bad-budget"),
        (b'{"latency_ms": "50"}', 422, "bad-budget"),
        (b'{"latency_ms": 0.5}', 422, "bad-budget"),
        (b'{"latency_ms": -50}', 422, "bad-budget"),
        (b'{"latency_ms": NaN}', 422, "bad-budget"),
        (b'{"latency_ms": 1e9, "fraction": 0.4}', 422, "bad-budget"),
        (b'{"latency_ms": 50, "fraction": 0.4, "accuracy": 0.7}', 422, "bad-budget"),
        (b'{"latency_ms": 50, "fraction": 40}', 422, "budget-out-of-range"),
        (b" " * 70_000, 413, "body-too-large"),
    ],
)
def test_invalid_budgets_are_refused(http: Http, body: bytes, status: int, kind: str) -> None:
    document = problem(http.put("/budget", content=body, headers=JSON), status, kind)
    assert "fraction" in document["detail"]
    assert "image" not in document["detail"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"fraction": NaN}', "fraction: input should be a finite number"),
        (b'{"latency_ms": NaN}', "latency_ms: input should be a finite number"),
        (b'{"fraction": 0.5, "fraction": 0.9}', "fraction is given twice"),
    ],
)
def test_refusals_of_budgets_have_the_reason(http: Http, body: bytes, why: str) -> None:
    before = http.get("/budget").json()["average_mflops"]
    assert http.put("/budget", content=body, headers=JSON).json()["detail"].startswith(why)
    assert http.get("/budget").json()["average_mflops"] == before


def test_a_budget_is_json(http: Http) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": content_type} if content_type else {}
        problem(http.put("/budget", content=b'{"fraction": 0.5}', headers=headers), 415, "unsupported-media-type")


def test_a_budget_above_the_frontiers_end_is_not_spent(folder: Path) -> None:
    with serving(build_app(folder, budget_fraction=None)) as http:
        state = http.get("/budget").json()
        assert state["fraction"] == pytest.approx(1)
        curve = http.get("/budget/frontier").json()
        assert state["frontier_ends_below_budget"] == (curve["average_mflops"][-1] < state["average_mflops"])
        assert state["expected"]["average_mflops"] == pytest.approx(curve["average_mflops"][-1])


def test_the_frontier_is_a_curve(http: Http) -> None:
    curve = http.get("/budget/frontier").json()
    n_points = len(curve["average_mflops"])
    assert n_points > 10
    assert all(len(values) == n_points for values in curve.values())
    assert curve["average_mflops"] == sorted(curve["average_mflops"])
    full = http.get("/model").json()["exits"][-1]["executed_mflops"]
    assert curve["fraction"] == pytest.approx([cost / full for cost in curve["average_mflops"]])
    assert all(sum(shares) == pytest.approx(1) for shares in curve["exit_shares"])
    assert {len(thresholds) for thresholds in curve["thresholds"]} == {4}


def test_the_ledger_equals_the_answers(folder: Path) -> None:
    with serving(build_app(folder)) as http:
        bodies = [png(image) for image in random_images(60, seed=21)]
        answers = [response.json() for response in http.post_all("/classify", bodies, 8, headers=PNG)]
        state = http.get("/budget").json()
        spent = sum(answer["mflops"] for answer in answers)
        assert state["ledger"]["answered"] == state["rolling"]["images"] == 60
        assert state["ledger"]["total_mflops"] == pytest.approx(spent, rel=1e-9)
        assert state["rolling"]["average_mflops"] == pytest.approx(spent / 60, rel=1e-9)
        assert spent <= (60 + state["ledger"]["burst_images"]) * state["average_mflops"]


def test_every_number_of_the_document_is_its_own(bundle: Bundle) -> None:
    latency = LatencyState(target_s=0.0505, p95_s=0.0405, n_answers=30, limited_s=60.0, is_lowest=False)
    now = BudgetState(
        budget_mflops=0.5,
        fraction=0.1234567,
        working_mflops=bundle.costs_mflops[0],
        burst_images=40.0,
        position=0.5,
        thresholds=(0.25, inf, 0.5, -inf),
        expected_mflops=0.41,
        expected_accuracy=0.42,
        expected_shares=(0.1, 0.2, 0.3, 0.4),
        frontier_limited=True,
        rolling_mflops=0.43,
        settled_mflops=0.44,
        reserved_mflops=0.45,
        answered=1_234,
        abandoned=5,
        spent_answered_mflops=600.5,
        spent_abandoned_mflops=2.5,
        latency=latency,
    )
    targets = Targets(bundle.frontier(), bundle.costs_mflops)
    document = orjson.loads(_answer(targets, Target("accuracy", 0.5, 0.0505), now).body)
    set_for, working = targets.expected(0.5), targets.expected(bundle.costs_mflops[0])
    since = datetime.fromisoformat(document["latency"].pop("limited_since"))
    assert timedelta(seconds=50) < datetime.now(UTC) - since < timedelta(seconds=60 + LIMIT_S)
    assert document == {
        "average_mflops": 0.5,
        "fraction": 0.123457,
        "accuracy": round(set_for.accuracy, 5),
        "set_as": "accuracy",
        "expected": {
            "average_mflops": set_for.cost,
            "accuracy": round(set_for.accuracy, 5),
            "exit_shares": [round(share, 5) for share in set_for.shares],
        },
        "frontier_ends_below_budget": True,
        "thresholds": [0.25, None, 0.5, None],
        "rolling": {"images": 1_000, "average_mflops": 0.43},
        "ledger": {"answered": 1_234, "total_mflops": 600.5, "saved_mflops": 0.44, "burst_images": 40.0},
        "latency": {
            "target_ms": 50.5,
            "p95_ms": 40.5,
            "answers": 30,
            "limited": True,
            "at_lowest": False,
            "working": {
                "average_mflops": bundle.costs_mflops[0],
                "fraction": round(bundle.costs_mflops[0] / bundle.costs_mflops[-1], 6),
                "accuracy": round(working.accuracy, 5),
            },
        },
        "allowed": {
            kind: dict(zip(("lowest", "highest"), ends, strict=True)) for kind, ends in targets.allowed.items()
        },
    }


# --- a latency target -------------------------------------------------------------------------------------------


def test_a_latency_target_may_have_a_ceiling_and_ends_with_the_next_budget(http: Http) -> None:
    state = http.put("/budget", json={"latency_ms": 60_000}).json()
    assert (state["fraction"], state["latency"]["target_ms"]) == (1.0, 60_000)
    state = http.put("/budget", json={"latency_ms": 50.5, "fraction": 0.5}).json()
    assert (state["fraction"], state["set_as"]) == (pytest.approx(0.5, rel=1e-5), "fraction")
    assert state["latency"] == {
        "target_ms": 50.5,
        "p95_ms": None,
        "answers": 0,
        "limited": False,
        "limited_since": None,
        "at_lowest": False,
        "working": {key: state[key] for key in ("average_mflops", "fraction", "accuracy")},
    }
    problem(http.put("/budget", json={"latency_ms": 20, "fraction": 40}), 422, "budget-out-of-range")
    assert http.get("/budget").json()["latency"]["target_ms"] == 50.5
    assert http.put("/budget", json={"fraction": 0.5}).json()["latency"] is None


def test_a_target_can_be_set_at_the_start(folder: Path) -> None:
    with serving(build_app(folder, latency_ms=75)) as http:
        state = http.get("/budget").json()
        assert (state["fraction"], state["latency"]["target_ms"]) == (pytest.approx(0.6, rel=1e-5), 75)


def test_late_answers_lower_the_working_budget_which_is_reported(folder: Path) -> None:
    """No image is answered within a millisecond of its last byte, so the budget must fall."""
    with serving(build_app(folder, access_log="off")) as http:
        full = http.get("/model").json()["exits"][-1]["executed_mflops"]
        http.put("/budget", json={"latency_ms": 1, "fraction": 0.8})
        bodies = [png(image) for image in random_images(60, seed=22)]

        def is_at_lowest() -> bool:
            for response in http.post_all("/classify", bodies, 2, headers=PNG):
                assert response.status_code in (200, 429)
            return http.get("/budget").json()["latency"]["at_lowest"]

        wait_until("the budget is at its lowest", is_at_lowest)
        state = http.get("/budget").json()
        latency = state["latency"]
        assert latency["limited"]
        assert latency["p95_ms"] > 1
        assert latency["answers"] >= 20
        since = datetime.fromisoformat(latency["limited_since"])
        assert timedelta(0) <= datetime.now(UTC) - since < timedelta(seconds=60)
        assert latency["working"]["average_mflops"] == pytest.approx(state["allowed"]["average_mflops"]["lowest"])
        assert latency["working"]["accuracy"] < state["accuracy"]
        assert state["average_mflops"] == pytest.approx(0.8 * full)  # the budget as set
        assert http.post("/classify", content=bodies[0], headers=PNG).json()["exit"] == 1
        told = dict(
            line.removeprefix("exitserve_").split(" ")
            for line in http.get("/metrics").text.splitlines()
            if line.startswith(("exitserve_latency", "exitserve_working", "exitserve_budget"))
        )
        assert float(told["working_mflops"]) == pytest.approx(latency["working"]["average_mflops"])
        assert float(told["budget_mflops"]) == pytest.approx(0.8 * full)
        assert float(told["latency_target_seconds"]) == 0.001
        assert float(told["latency_p95_seconds"]) > 0.001
        assert (told["latency_limited"], told["latency_at_lowest"]) == ("1.0", "1.0")
        assert float(told["latency_limited_seconds_total"]) > 0
        state = http.put("/budget", json={"fraction": 0.8}).json()
        assert state["latency"] is None
        assert "exitserve_latency_limited 0.0" in http.get("/metrics").text


def test_the_engines_budget_and_the_reported_one_never_differ() -> None:
    """Two clients set a budget at once: the engine keeps the last one, `/budget` reports it, and each gets its own."""
    began, go_on, kept = threading.Event(), threading.Event(), [0.0]

    class Engine:
        def set_budget(self, budget_mflops: float, latency_s: float | None) -> float:
            kept[0] = budget_mflops
            if not began.is_set():
                began.set()
                assert go_on.wait(LIMIT_S)
            return budget_mflops

        def budget_state(self) -> float:
            return kept[0]

    keeper = Keeper(Engine(), Target("fraction", 0.0))  # type: ignore[arg-type]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(keeper.set, Target("fraction", 1.0))
        assert began.wait(LIMIT_S)
        second = pool.submit(keeper.set, Target("fraction", 2.0))
        wait([second], timeout=0.2)  # it has to wait for the first
        go_on.set()
        assert (first.result(LIMIT_S), second.result(LIMIT_S)) == (1.0, 2.0)
    assert keeper.read() == (Target("fraction", 2.0), 2.0)


def test_setting_a_budget_returns_that_budget(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if another client has set one before the answer is written."""
    keep = Keeper.set

    def keep_and_be_overtaken(keeper: Keeper, target: Target) -> Any:
        state = keep(keeper, target)
        keep(keeper, replace(target, kind="average_mflops", average_mflops=target.average_mflops / 2))
        return state

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "set", keep_and_be_overtaken)
        state = http.put("/budget", json={"fraction": 0.8}).json()
    assert (state["fraction"], state["set_as"]) == (pytest.approx(0.8, rel=1e-5), "fraction")
    assert http.get("/budget").json()["fraction"] == pytest.approx(0.4, rel=1e-5)
