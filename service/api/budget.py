"""`/budget`: reads and sets the operator's budget, and shows the expected results of all others."""

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from service.api.answers import BudgetRequest, BudgetState, FrontierCurve, ProblemDocument
from service.api.authority import require_authority
from service.api.bodies import media_type, read_body, unsupported
from service.api.documents import finite
from service.api.problems import Problem
from service.api.queries import read_query
from service.api.state import State
from service.budget.latency import LatencyState as EngineLatency
from service.budget.ledger import ROLLING_ANSWERS
from service.budget.state import BudgetState as EngineBudget
from service.budget.target import KINDS, Target, TargetError, Targets

MAX_BYTES = 64 * 1024
EXAMPLES = 'one of {"average_mflops": 40}, {"fraction": 0.4} and {"accuracy": 0.74}, or {"latency_ms": 50}, or both'


def budget_routes(state: State) -> APIRouter:
    router = APIRouter(tags=["budget"])
    curve = _curve(state.targets)

    @router.get(
        "/budget",
        response_model=BudgetState,
        summary="The budget, its expected results, and what is spent",
        responses={422: {"model": ProblemDocument}},
    )
    async def read(request: Request) -> Response:
        state.require_open()
        read_query(request.scope["query_string"], ())
        return _answer(state.targets, *await asyncio.to_thread(state.keeper.read))

    @router.put(
        "/budget",
        response_model=BudgetState,
        summary="Set the average compute per image",
        description="Replaces the whole budget, for images admitted from now on: without `latency_ms` there is no "
        "latency target. Requires the admin token if one is configured; otherwise only clients on the server's own "
        "machine may call it.",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": _schema(state.targets),
                        "examples": _examples(state.targets),
                    }
                },
            },
            "security": [{}, {"admin": []}],
        },
        responses={status: {"model": ProblemDocument} for status in (400, 401, 403, 408, 413, 415, 422)},
    )
    async def write(request: Request) -> Response:
        require_authority(request, state.admin_token)
        state.require_open()
        read_query(request.scope["query_string"], ())
        if (sent := media_type(request)) != "application/json":
            raise unsupported(
                f"A budget is JSON, not {sent or 'untyped'}: send {EXAMPLES} with the content type application/json "
                "(curl -H 'Content-Type: application/json')."
            )
        body = await read_body(request, MAX_BYTES, state.settings.body_timeout_s, f"send {EXAMPLES}")
        target = _resolve(state.targets, body)
        return _answer(state.targets, target, await asyncio.to_thread(state.keeper.set, target))

    @router.get(
        "/budget/frontier",
        response_model=FrontierCurve,
        summary="Expected accuracy against average cost",
        responses={422: {"model": ProblemDocument}},
    )
    async def frontier(request: Request) -> Response:
        read_query(request.scope["query_string"], ())
        return Response(curve, media_type="application/json")

    return router


def _answer(targets: Targets, target: Target, now: EngineBudget) -> Response:
    """The document that `BudgetState` describes: the budget as it was requested, and its state in the engine."""
    expected = targets.expected(now.budget_mflops)
    document = {
        "average_mflops": now.budget_mflops,
        "fraction": round(now.fraction, 6),
        "accuracy": round(expected.accuracy, 5),
        "set_as": target.kind,
        "expected": {
            "average_mflops": expected.cost,
            "accuracy": round(expected.accuracy, 5),
            "exit_shares": [round(share, 5) for share in expected.shares],
        },
        "frontier_ends_below_budget": now.frontier_limited,
        "thresholds": [finite(threshold) for threshold in now.thresholds],
        "rolling": {
            "images": min(now.answered, ROLLING_ANSWERS),
            "average_mflops": now.rolling_mflops,
        },
        "ledger": {
            "answered": now.answered,
            "total_mflops": now.spent_answered_mflops,
            "saved_mflops": now.settled_mflops,
            "burst_images": now.burst_images,
        },
        "latency": None if now.latency is None else _latency(targets, now, now.latency),
        "allowed": {
            kind: {"lowest": lowest, "highest": highest} for kind, (lowest, highest) in targets.allowed.items()
        },
    }
    return Response(orjson.dumps(document), media_type="application/json")


def _latency(targets: Targets, now: EngineBudget, latency: EngineLatency) -> dict[str, object]:
    limited_since = None
    if latency.limited_s is not None:
        began = datetime.now(UTC) - timedelta(seconds=latency.limited_s)
        limited_since = began.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "target_ms": round(latency.target_s * 1e3, 3),
        "p95_ms": None if latency.p95_s is None else round(latency.p95_s * 1e3, 3),
        "answers": latency.n_answers,
        "limited": limited_since is not None,
        "limited_since": limited_since,
        "at_lowest": latency.is_lowest,
        "working": {
            "average_mflops": now.working_mflops,
            "fraction": round(now.working_mflops / targets.full_mflops, 6),
            "accuracy": round(targets.expected(now.working_mflops).accuracy, 5),
        },
    }


def _schema(targets: Targets) -> dict[str, Any]:
    """The JSON schema of a budget, with the ranges that this network allows."""
    schema = BudgetRequest.model_json_schema()
    nulls: dict[str, Any] = {kind: {"type": "null"} for kind in targets.allowed}
    schema["oneOf"] = [
        {"required": [kind], "properties": {**nulls, kind: {"type": "number", "minimum": lowest, "maximum": highest}}}
        for kind, (lowest, highest) in targets.allowed.items()
    ]
    schema["oneOf"].append({"required": ["latency_ms"], "properties": {**nulls, "latency_ms": {"type": "number"}}})
    return schema


def _examples(targets: Targets) -> dict[str, Any]:
    """Example budgets for OpenAPI, from the middle of the allowed ranges."""
    halfway = {kind: round((lowest + highest) / 2, 4) for kind, (lowest, highest) in targets.allowed.items()}
    budgets: dict[str, Any] = {kind: {"value": {kind: value}} for kind, value in halfway.items()}
    return {**budgets, "latency_ms": {"value": {"latency_ms": 50, "fraction": halfway["fraction"]}}}


def _resolve(targets: Targets, body: bytes) -> Target:
    try:
        asked = BudgetRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise Problem(
                400, "broken-json", "Broken JSON", f"The body is not JSON ({first['msg']}): send {EXAMPLES}."
            ) from None
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise _bad_budget(f"{where}: {first['msg'].lower()}") from None
    names: list[str] = json.loads(body, object_pairs_hook=lambda members: [name for name, _ in members])
    if twice := {name for name in set(names) if names.count(name) > 1}:
        raise _bad_budget(f"{' and '.join(sorted(twice))} is given twice")
    given = {kind: value for kind in KINDS if (value := getattr(asked, kind)) is not None}
    latency_s = None if asked.latency_ms is None else asked.latency_ms / 1e3
    if not given and latency_s is not None:
        given = {"fraction": 1.0}
    if len(given) != 1:
        raise Problem(
            422,
            "bad-budget",
            "Bad budget",
            f"{len(given)} of {', '.join(KINDS)} are given: send one of them, or latency_ms.",
        )
    [(kind, value)] = given.items()
    try:
        return replace(targets.resolve(kind, value), latency_s=latency_s)
    except TargetError as error:
        lowest, highest = targets.allowed[kind]
        raise Problem(
            422,
            "budget-out-of-range",
            "Budget out of range",
            str(error),
            allowed={"lowest": lowest, "highest": highest},
        ) from None


def _bad_budget(why: str) -> Problem:
    return Problem(422, "bad-budget", "Bad budget", f"{why}. Send {EXAMPLES}.")


def _curve(targets: Targets) -> bytes:
    frontier = targets.frontier
    return orjson.dumps(
        {
            "average_mflops": frontier.cost,
            "fraction": [cost / targets.full_mflops for cost in frontier.cost],
            "accuracy": frontier.accuracy,
            "exit_shares": frontier.shares,
            "thresholds": [[finite(threshold) for threshold in thresholds] for thresholds in frontier.thresholds],
        }
    )
