"""`GET /budget/access`: whether this client may set the budget, so that the page can show it beforehand."""

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from service.api.answers import ProblemDocument
from service.api.authority import require_authority
from service.api.problems import Problem
from service.api.queries import read_query
from service.api.state import State


class Access(BaseModel):
    may_set: bool = Field(description="whether this client, with the token it sent, may call PUT /budget")
    kind: str | None = Field(examples=["token-required"], description="of the problem that PUT /budget would return")
    detail: str | None = Field(description="cause and remedy of that problem, as text")


def access_routes(state: State) -> APIRouter:
    router = APIRouter(tags=["budget"])

    @router.get(
        "/budget/access",
        response_model=Access,
        summary="May this client set the budget?",
        responses={422: {"model": ProblemDocument}},
    )
    async def access(request: Request) -> Response:
        read_query(request.scope["query_string"], ())
        try:
            require_authority(request, state.admin_token)
        except Problem as problem:
            document = {"may_set": False, "kind": problem.kind, "detail": problem.args[0]}
        else:
            document = {"may_set": True, "kind": None, "detail": None}
        return Response(orjson.dumps(document), media_type="application/json")

    return router
