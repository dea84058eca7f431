"""`/classify/stream`: a line per exit, the last with the answer; and failures on the way."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from starlette.requests import ClientDisconnect

from service.api import answers
from service.api.stream import MEDIA_TYPE
from service.engine.engine import Engine
from service.engine.rows import Answer, Options, Step
from service.errors import EngineError
from service.tally import OUTCOMES
from tests.bundles import random_images
from tests.service.api.test_delivery import keep_busy, stays
from tests.service.apps import PNG, Http, build_app, png, problem, serving

IMAGES = random_images(8, seed=13)
BODIES = [png(image) for image in IMAGES]
STEP = Step(1, "noise 1", 0.3, ((1, 0.3),), 1, 0.5, 0.1, 0.2)


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    return []


@pytest.fixture(scope="module")
def http(folder: Path, engines: list[Engine]) -> Iterator[Http]:
    with serving(build_app(folder, keep=engines.append, budget_fraction=1.0, burst_images=1000)) as client:
        yield client


def lines(http: Http, query: str = "", body: bytes = BODIES[0]) -> list[dict[str, Any]]:
    response = http.post(f"/classify/stream{query}", content=body, headers=PNG)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    assert "content-length" not in response.headers
    # Nothing on the way may keep lines back.
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-store", "no")
    assert response.text.endswith("\n")
    return [orjson.loads(line) for line in response.text.splitlines()]


def test_there_is_a_line_for_every_exit_and_the_last_is_the_answer(http: Http) -> None:
    *steps, last = lines(http, "?exit=4&top_k=3")
    assert [step["exit"] for step in steps] == [1, 2, 3]
    model = http.get("/model").json()
    for step in steps:
        assert set(step) == set(answers.Step.model_fields)
        answers.Step.model_validate(step, strict=True)
        assert step["final"] is False
        assert step["label"] == model["class_names"][step["class_id"]]
        assert step["top_k"][0] == {key: step[key] for key in ("label", "class_id", "confidence")}
        assert len(step["top_k"]) == 3
        assert step["mflops"] == pytest.approx(model["exits"][step["exit"] - 1]["executed_mflops"])
    assert set(last) == set(answers.LastStep.model_fields)
    answers.LastStep.model_validate(last, strict=True)
    assert (last["final"], last["exit"], last["reason"], last["threshold"]) == (True, 4, "pinned", None)
    assert len(last["top_k"]) == 3


def test_the_last_line_is_the_answer_of_classify(http: Http) -> None:
    for body in BODIES:
        *steps, last = lines(http, "?min_confidence=0.5", body)
        plain = http.post("/classify?min_confidence=0.5", content=body, headers=PNG).json()
        for key in ("label", "confidence", "top_k", "exit", "reason", "mflops"):
            assert last[key] == plain[key]
        assert [step["exit"] for step in steps] == list(range(1, last["exit"]))
        assert all(step["confidence"] < 0.5 for step in steps)
        assert last["confidence"] >= 0.5 or last["reason"] == "final"


@pytest.mark.parametrize(
    ("query", "body", "status", "kind"),
    [
        ("", b"no image", 400, "not-an-image"),
        ("?exit=9", BODIES[0], 422, "bad-parameter"),
        ("", b"", 400, "empty-image"),
    ],
)
def test_errors_before_the_first_line_have_a_status(
    http: Http, query: str, body: bytes, status: int, kind: str
) -> None:
    problem(http.post(f"/classify/stream{query}", content=body, headers=PNG), status, kind)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (EngineError("stage 2 failed: no memory"), "engine-error", "no memory"),
        (KeyError("a fault of the server's own"), "internal-error", "Report it with request id"),
    ],
)
def test_errors_after_the_first_line_are_the_last_line(
    http: Http, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, told: str
) -> None:
    async def breaks(*args: Any) -> Any:
        yield STEP
        raise error

    monkeypatch.setattr("service.api.delivery.Delivery.follow", breaks)
    before = counted(http, "failed")
    first, last = lines(http)
    assert first["exit"] == 1
    assert last["type"] == f"urn:exitserve:problem:{kind}"
    assert (last["status"], last["final"], last["instance"]) == (500, True, "/classify/stream")
    assert told in last["detail"]
    assert counted(http, "failed") == before + 1


def test_a_client_that_leaves_after_the_first_line_has_no_answer(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    async def leaves(*args: Any) -> Any:
        yield STEP
        raise ClientDisconnect

    monkeypatch.setattr("service.api.delivery.Delivery.follow", leaves)
    before = {outcome: counted(http, outcome) for outcome in OUTCOMES}
    assert len(lines(http)) == 1
    assert {outcome: counted(http, outcome) for outcome in OUTCOMES} == {**before, "abandoned": before["abandoned"] + 1}


def counted(http: Http, outcome: str) -> float:
    prefix = f'exitserve_requests_total{{outcome="{outcome}"}} '
    [line] = [line for line in http.get("/metrics").text.splitlines() if line.startswith(prefix)]
    return float(line.removeprefix(prefix))


def test_a_line_is_sent_as_soon_as_its_exit_is_done(http: Http, engines: list[Engine]) -> None:
    """The engine's thread is blocked after exit 1, but the line of exit 1 arrives."""
    engine = engines[0]

    async def follow() -> None:
        from service.api.delivery import Delivery

        told = Delivery(engine).follow(IMAGES[0], Options(exit=4, steps=True), stays)
        first = await anext(told)
        assert isinstance(first, Step)
        assert first.exit == 1
        go_on = keep_busy(engine)
        rest = asyncio.create_task(_all(told))
        await asyncio.sleep(0)
        go_on.set()
        *steps, answer = await rest
        assert [step.exit for step in steps if isinstance(step, Step)] == [2, 3]
        assert isinstance(answer, Answer)

    http.run(follow())


async def _all(told: Any) -> list[Step | Answer]:
    return [item async for item in told]


def test_a_client_that_leaves_in_the_middle_abandons_its_image(http: Http, engines: list[Engine]) -> None:
    engine = engines[0]
    before = engine.stats().abandoned

    async def leave() -> None:
        from service.api.delivery import Delivery

        gone = asyncio.Event()

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        go_on = keep_busy(engine)
        told = Delivery(engine).follow(IMAGES[0], Options(exit=4, steps=True), receive)  # type: ignore[arg-type]
        gone.set()
        with pytest.raises(ClientDisconnect):
            await anext(told)
        go_on.set()

    http.run(leave())
    stats = engine.stats()
    assert stats.abandoned == before + 1
    assert stats.in_flight_rows == 0
