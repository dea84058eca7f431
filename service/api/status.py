"""`/healthz`, `/readyz`, `/metrics` and `/model`: the state of the server and its network."""

import asyncio

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from service.api.answers import Health, ProblemDocument, Readiness
from service.api.queries import read_query
from service.api.state import State

# Left out of `GET /model`: clients have no use for the paths and hashes of files.
PRIVATE = {"files", "stages", "int8"}


def status_routes(state: State) -> APIRouter:
    router = APIRouter()
    public = state.bundle.manifest.model_dump(mode="json", exclude=PRIVATE)
    # Not orjson: a manifest's training record may hold integers too large for it, such as seeds. NaN becomes null.
    model_document = to_json({**public, "precision": state.bundle.precision}, inf_nan_mode="null")

    @router.get("/healthz", response_model=Health, tags=["status"], summary="Is the process alive?")
    async def healthz() -> Response:
        return _json(b'{"status":"alive"}')

    @router.get(
        "/readyz",
        response_model=Readiness,
        tags=["status"],
        summary="Does the server accept images? 503 while it warms up or stops.",
        responses={503: {"model": ProblemDocument}},
    )
    async def readyz() -> Response:
        state.require_ready()
        return _json(b'{"status":"ready"}')

    @router.get("/metrics", tags=["status"], summary="Metrics for Prometheus", response_class=Response)
    async def metrics() -> Response:
        content, content_type = await asyncio.to_thread(state.metrics.exposition, state.is_ready)
        return Response(content, headers={"Content-Type": content_type})

    @router.get(
        "/model",
        tags=["model"],
        summary="The network: classes, exits, costs, accuracies",
        responses={422: {"model": ProblemDocument}},
    )
    async def model(request: Request) -> Response:
        read_query(request.scope["query_string"], ())
        return _json(model_document)

    return router


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
