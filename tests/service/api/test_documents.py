"""The documents of answers, in their units, and what becomes of each error: problem, advice and count."""

import pytest
from starlette.requests import ClientDisconnect

from models.bundle import Bundle
from service.api.documents import Documents, engine_problem, image_problem, outcome
from service.api.problems import Problem
from service.engine.rows import Answer
from service.errors import EngineDraining, EngineError, EngineLost, EngineOverloaded, EngineTooLate, EngineUnsound
from service.images.decoder import ImageError


def test_an_answer_is_written_in_milliseconds_and_millionths(bundle: Bundle) -> None:
    names, full_mflops = bundle.manifest.class_names, bundle.costs_mflops[-1]
    answer = Answer(2, names[2], 0.1234567, ((5, 0.0000125),), 3, "confident", 0.25, 1.23456, 2.5, 4)
    assert Documents(bundle.manifest).answer(answer, decode_s=0.0031, total_s=0.0071234, request_id="mine") == {
        "label": names[2],
        "class_id": 2,
        "confidence": 0.123457,
        "top_k": [
            {"label": names[2], "class_id": 2, "confidence": 0.123457},
            {"label": names[5], "class_id": 5, "confidence": 0.000013},
        ],
        "exit": 3,
        "exits": 4,
        "reason": "confident",
        "mflops": 0.25,
        "full_mflops": full_mflops,
        "model": bundle.manifest.name,
        "version": bundle.manifest.version,
        "timings": {"decode_ms": 3.1, "queue_ms": 1.235, "stages_ms": 2.5, "total_ms": 7.123},
        "request_id": "mine",
    }


@pytest.mark.parametrize(
    ("error", "status", "kind", "counted", "retry_after"),
    [
        (EngineOverloaded(12, 1.25), 429, "overloaded", "overloaded", "2"),
        (EngineOverloaded(12, 0.0), 429, "overloaded", "overloaded", "1"),
        (EngineTooLate(), 504, "deadline-passed", "overloaded", None),
        (EngineUnsound("no stage can be run"), 503, "not-ready", "unavailable", "1"),
        (EngineLost("the device is lost"), 503, "not-ready", "unavailable", "1"),
        (EngineDraining("stopping"), 503, "not-ready", "unavailable", "1"),
        (EngineError("stage 1 failed"), 500, "engine-error", "failed", None),
    ],
)
def test_an_error_of_the_engine_has_its_problem_and_is_counted_as_such(
    error: EngineError, status: int, kind: str, counted: str, retry_after: str | None
) -> None:
    problem = engine_problem(error)
    assert (problem.status, problem.kind) == (status, kind)
    assert problem.headers.get("Retry-After") == retry_after
    assert str(error) in problem.detail
    assert outcome(problem) == counted


def test_the_wait_before_the_next_try_is_told_exactly_in_the_document() -> None:
    assert engine_problem(EngineOverloaded(12, 1.25)).extensions == {"retry_after_s": 1.25}
    assert engine_problem(EngineOverloaded(12, 0.0)).extensions == {"retry_after_s": 0.01}


def test_other_ends_are_counted_by_who_can_help() -> None:
    for kind, status in (("not-an-image", 400), ("image-too-large", 413), ("animated-image", 415)):
        problem = image_problem(ImageError(kind, "why"))
        assert (problem.status, outcome(problem)) == (status, "invalid")
    assert outcome(ClientDisconnect()) == "abandoned"
    assert outcome(Problem(408, "body-too-slow", "Slow", "why")) == "invalid"
    assert outcome(RuntimeError("a bug")) == "failed"
