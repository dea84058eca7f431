"""`/budget`: read the one number that the operator sets, set it, and see what others would bring."""

import asyncio
import math
from collections.abc import Sequence

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from service.api.answers import BudgetRequest, BudgetState, FrontierCurve, ProblemDocument
from service.api.authority import require_authority
from service.api.bodies import read_body
from service.api.problems import Problem
from service.api.queries import read_query
from service.api.state import State
from service.ledger import ROLLING_ANSWERS
from service.target import KINDS, Target, TargetError

MAX_BYTES = 64 * 1024
EXAMPLES = '{"average_mflops": 40}, {"fraction": 0.4} or {"accuracy": 0.74}'


class Budget:
    """The operator's budget as it was asked for; the engine keeps the number itself."""

    def __init__(self, state: State, target: Target) -> None:
        self.state = state
        self.target = target

    async def document(self) -> bytes:
        """Everything about the budget, as `BudgetState` describes it."""
        now = await asyncio.to_thread(self.state.engine.budget_state)
        targets = self.state.targets
        expected = targets.expected(now.budget_mflops)
        return orjson.dumps(
            {
                "average_mflops": now.budget_mflops,
                "fraction": round(now.fraction, 6),
                "accuracy": round(expected.accuracy, 5),
                "set_as": self.target.kind,
                "expected": {
                    "average_mflops": expected.cost,
                    "accuracy": round(expected.accuracy, 5),
                    "exit_shares": [round(share, 5) for share in expected.shares],
                },
                "frontier_ends_below_budget": now.frontier_limited,
                "thresholds": _finite(now.thresholds),
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
                "allowed": {
                    kind: {"lowest": lowest, "highest": highest} for kind, (lowest, highest) in targets.allowed.items()
                },
            }
        )


def budget_routes(state: State, target: Target) -> APIRouter:
    router = APIRouter(tags=["budget"])
    budget = Budget(state, target)
    curve = _curve(state)

    @router.get("/budget", response_model=BudgetState, summary="The budget, what to expect of it, and what is spent")
    async def read(request: Request) -> Response:
        state.require_ready()
        read_query(request.scope["query_string"], ())
        return Response(await budget.document(), media_type="application/json")

    @router.put(
        "/budget",
        response_model=BudgetState,
        summary="Set the average compute per image",
        description="From the next image on. Needs the admin token where one is configured; where none is, only "
        "clients on the server's own machine may.",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": BudgetRequest.model_json_schema(),
                        "examples": {
                            "mflops": {"value": {"average_mflops": 40}},
                            "fraction": {"value": {"fraction": 0.4}},
                            "accuracy": {"value": {"accuracy": 0.74}},
                        },
                    }
                },
            },
            "security": [{}, {"admin": []}],
        },
        responses={status: {"model": ProblemDocument} for status in (400, 401, 403, 408, 413, 415, 422)},
    )
    async def write(request: Request) -> Response:
        require_authority(request, state.admin_token)
        state.require_ready()
        read_query(request.scope["query_string"], ())
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise Problem(
                415,
                "unsupported-media-type",
                "Unsupported media type",
                f"A budget is JSON, not {media_type or 'untyped'}: send {EXAMPLES} with the content type "
                "application/json.",
            )
        body = await read_body(request, MAX_BYTES, state.settings.body_timeout_s)
        asked = _resolve(state, body)
        await asyncio.to_thread(state.engine.set_budget, asked.average_mflops)
        budget.target = asked
        return Response(await budget.document(), media_type="application/json")

    @router.get("/budget/frontier", response_model=FrontierCurve, summary="What each budget would bring")
    async def frontier(request: Request) -> Response:
        read_query(request.scope["query_string"], ())
        return Response(curve, media_type="application/json")

    return router


def _resolve(state: State, body: bytes) -> Target:
    try:
        asked = BudgetRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise Problem(
                400, "broken-json", "Broken JSON", f"The body is not JSON ({first['msg']}): send {EXAMPLES}."
            ) from None
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise Problem(422, "bad-budget", "Bad budget", f"{where}: {first['msg'].lower()}. Send {EXAMPLES}.") from None
    given = {kind: value for kind in KINDS if (value := getattr(asked, kind)) is not None}
    if len(given) != 1:
        raise Problem(
            422, "bad-budget", "Bad budget", f"{len(given)} of {', '.join(KINDS)} are given: send exactly one of them."
        )
    [(kind, value)] = given.items()
    try:
        return state.targets.resolve(kind, value)
    except TargetError as error:
        lowest, highest = state.targets.allowed[kind]
        raise Problem(
            422,
            "budget-out-of-range",
            "Budget out of range",
            str(error),
            allowed={"lowest": lowest, "highest": highest},
        ) from None


def _curve(state: State) -> bytes:
    frontier = state.targets.frontier
    return orjson.dumps(
        {
            "average_mflops": frontier.cost,
            "fraction": [cost / state.targets.full_mflops for cost in frontier.cost],
            "accuracy": frontier.accuracy,
            "exit_shares": frontier.shares,
            "thresholds": [_finite(thresholds) for thresholds in frontier.thresholds],
        }
    )


def _finite(thresholds: Sequence[float]) -> list[float | None]:
    return [threshold if math.isfinite(threshold) else None for threshold in thresholds]
