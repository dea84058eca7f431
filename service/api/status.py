"""Alive, ready, measured, and which model: the calls of machines and of the curious."""

import asyncio
from html import escape
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from service.api.answers import Health, ProblemDocument, Readiness
from service.api.queries import read_query
from service.api.state import State

# A client has no use for where files lie or how they hash; `GET /model` leaves these out.
PRIVATE = {"files", "stages"}


def status_routes(state: State) -> APIRouter:
    router = APIRouter()
    public = state.bundle.manifest.model_dump(mode="json", exclude=PRIVATE)
    model_document = orjson.dumps(public)
    index = _index(public)

    @router.get("/healthz", response_model=Health, tags=["status"], summary="Is the process alive?")
    async def healthz() -> Response:
        return _json(b'{"status":"alive"}')

    @router.get(
        "/readyz",
        response_model=Readiness,
        tags=["status"],
        summary="Will it answer? 503 while it warms up and once it is stopping.",
        responses={503: {"model": ProblemDocument}},
    )
    async def readyz() -> Response:
        state.require_ready()
        return _json(b'{"status":"ready"}')

    @router.get("/metrics", tags=["status"], summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        content, content_type = await asyncio.to_thread(state.metrics.exposition)
        return Response(content, headers={"Content-Type": content_type})

    @router.get("/model", tags=["model"], summary="The network: classes, exits, costs, accuracies")
    async def model(request: Request) -> Response:
        read_query(request.scope["query_string"], ())
        return _json(model_document)

    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        return HTMLResponse(index)

    return router


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _index(manifest: dict[str, Any]) -> str:
    links = (
        ("/docs", "the calls, with a form to try them"),
        ("/budget", "the budget now"),
        ("/budget/frontier", "what each budget would bring"),
        ("/model", "the network"),
        ("/metrics", "for Prometheus"),
        ("/readyz", "ready?"),
    )
    items = "".join(f'<li><a href="{path}">{path}</a>: {text}</li>' for path, text in links)
    title = f"ExitServe: {escape(manifest['name'])} {escape(manifest['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<body style="font-family:system-ui;margin:3rem"><h1>{title}</h1>'
        f"<p>{len(manifest['class_names'])} classes, {len(manifest['exits'])} exits.</p><ul>{items}</ul>"
        "<pre>curl --data-binary @cat.png -H 'Content-Type: image/png' "
        "http://localhost:8000/classify</pre></body></html>"
    )
