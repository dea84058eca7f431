"""Query options: parsed, validated, and applied."""

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.options import KNOWN, Asked, OptionReader
from service.api.problems import Problem
from service.engine.rows import Options
from tests.bundles import random_images
from tests.service.api.test_delivery import keep_busy
from tests.service.apps import PNG, Http, build_app, png, problem, serving

BODY = png(random_images(1, seed=19)[0])
READER = OptionReader(100, (13.391768, 22.9, 60.307544))


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        (b"", Asked(Options(top_k=5))),
        (b"top_k=2", Asked(Options(top_k=2))),
        (b"exit=3&top_k=1", Asked(Options(exit=3))),
        (b"min_confidence=.75", Asked(Options(5, min_confidence=0.75))),
        (b"min_confidence=0&deadline_ms=50", Asked(Options(5, min_confidence=0.0), 50.0)),
        (b"max_mflops=13.391768", Asked(Options(5, max_mflops=13.391768))),
        (b"max_mflops=1000000", Asked(Options(5, max_mflops=1e6))),
        (b"max_mflops=3.820728052080613e%2B16", Asked(Options(5, max_mflops=3.820728052080613e16))),
        (b"min_confidence=0.3710719865150565", Asked(Options(5, min_confidence=0.3710719865150565))),
        (b"deadline_ms=1.5", Asked(Options(5), 1.5)),
    ],
)
def test_a_query_is_parsed(query: bytes, asked: Asked) -> None:
    assert READER.read(query) == asked


def test_a_deadline_counts_from_the_complete_body() -> None:
    options = READER.read(b"deadline_ms=250&exit=2").at(100.0)
    assert (options.deadline_s, options.exit, options.is_plain) == (100.25, 2, False)
    assert READER.read(b"").at(100.0) is READER.default.options  # without options no object is created
    assert READER.read(b"").at(100.0, steps=True).deadline_s == inf


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("exit=0", "integer from 1 to 3"),
        ("exit=4", "integer from 1 to 3"),
        ("exit=two", "integer from 1 to 3"),
        ("exit=2&min_confidence=0.5", "give one of them"),
        ("min_confidence=1.1", "number from 0 to 1"),
        ("min_confidence=-1", "number from 0 to 1"),
        ("min_confidence=nan", "number from 0 to 1"),
        ("max_mflops=13.3", "at least 13.391768"),
        ("max_mflops=inf", "at least 13.391768"),
        ("max_mflops=1e", "at least 13.391768"),
        ("max_mflops=1e-3", "at least 13.391768"),
        ("deadline_ms=0", "number from 1 to 600000"),
        ("deadline_ms=600001", "number from 1 to 600000"),
        ("deadline_ms=", "number from 1 to 600000"),
        ("deadline=5", "not known"),
    ],
)
def test_a_bad_query_is_refused_with_the_valid_values(query: str, says: str) -> None:
    with pytest.raises(Problem) as refused:
        READER.read(query.encode())
    assert (refused.value.status, refused.value.kind) == (422, "bad-parameter")
    assert says in refused.value.detail
    assert refused.value.extensions["known"] == list(KNOWN)


@given(st.dictionaries(st.sampled_from(KNOWN), st.text("0123456789.-+eEnaif_ ", max_size=12)))
def test_any_query_is_parsed_within_its_limits_or_refused(query: dict[str, str]) -> None:
    text = "&".join(f"{name}={value.replace(' ', '%20').replace('+', '%2B')}" for name, value in query.items())
    try:
        asked = READER.read(text.encode())
    except Problem:
        return
    options = asked.options
    assert 1 <= options.top_k <= 100
    assert options.exit is None or 1 <= options.exit <= 3
    assert options.min_confidence is None or 0 <= options.min_confidence <= 1
    assert options.max_mflops >= 13.391768
    assert asked.deadline_ms is None or 1 <= asked.deadline_ms <= 600_000


# --- over HTTP --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def http(folder: Path, engines: list[Any]) -> Iterator[Http]:
    with serving(build_app(folder, keep=engines.append, budget_fraction=1.0, burst_images=1000)) as client:
        yield client


def test_options_are_applied(http: Http) -> None:
    def ask(query: str) -> dict[str, Any]:
        response = http.post("/classify?" + query, content=BODY, headers=PNG)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    exits = http.get("/model").json()["exits"]
    for number in range(1, 5):
        answer = ask(f"exit={number}")
        assert (answer["exit"], answer["reason"]) == (number, "pinned")
        assert answer["mflops"] == pytest.approx(exits[number - 1]["executed_mflops"])
    assert ask("min_confidence=0")["exit"] == 1
    assert ask("min_confidence=1")["reason"] == "final"
    cap = exits[1]["executed_mflops"]
    answer = ask(f"exit=4&max_mflops={cap}")
    assert (answer["exit"], answer["reason"]) == (2, "budget")
    assert ask("deadline_ms=60000&exit=4")["reason"] == "pinned"
    assert "deadline" in http.get("/metrics").text


def test_a_deadline_that_passes_before_the_first_exit_is_reported(http: Http, engines: list[Any]) -> None:
    engine = engines[0]
    go_on = keep_busy(engine)

    def go_on_when_it_is_there() -> None:
        in_time = engine._admission.in_flight == 1
        http.loop.call_later(0.01, go_on.set if in_time else go_on_when_it_is_there)

    http.loop.call_soon_threadsafe(go_on_when_it_is_there)
    refused = http.post("/classify?deadline_ms=1", content=BODY, headers=PNG)
    assert "deadline_ms" in problem(refused, 504, "deadline-passed")["detail"]
    assert http.post("/classify", content=BODY, headers=PNG).status_code == 200
