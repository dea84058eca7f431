"""Assembles the HTTP application around an engine, which it starts and, at shutdown, stops."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from models.bundle import Bundle
from service.api import page, problems
from service.api.batch import batch_routes
from service.api.budget import budget_routes
from service.api.classify import Classifier, classify_routes
from service.api.delivery import Delivery
from service.api.direct import Desk
from service.api.gate import Gate, LoggedGate
from service.api.lifecycle import ALWAYS_OPEN, Lifecycle
from service.api.ports import EnginePort, KeeperPort, MetricsPort
from service.api.state import State
from service.api.status import status_routes
from service.api.stream import stream_routes
from service.budget.target import Targets
from service.images.decoder import ImageDecoder
from service.settings import Settings

logger = logging.getLogger(__name__)

ABOUT = """\
Classifies images with an early-exit network: every image leaves at the first exit that is confident about it, and the
average compute per image is one number that you set (`PUT /budget`).

MFLOPs are millions of multiply-adds, as the early-exit literature counts them. Errors are problem documents
(RFC 9457): `detail` names cause and remedy, `type` is stable.
"""
ENGINE_STOP_S = 1.0  # the drain has already waited for requests; the rest have no client


def create_app(
    bundle: Bundle,
    engine: EnginePort,
    metrics: MetricsPort,
    targets: Targets,
    keeper: KeeperPort,
    settings: Settings,
    admin_token: str | None = None,
    on_started: Callable[[Exception | None], object] = lambda error: None,
) -> Gate:
    """Return the ASGI application that serves `engine`.

    Args:
        engine: not yet started; the application starts it while already listening, so that `/readyz` can report it.
        metrics: counts requests, and exposes the metrics of `engine`.
        targets, keeper: resolves requested budgets; holds the current one.
        admin_token: required to change the budget; without one, only clients on this machine may.
        on_started: called on the event loop with None once the engine is ready, or with the error that kept it from
            starting; not called with None if the server began to drain meanwhile.
    """
    lifecycle = Lifecycle()
    manifest = bundle.manifest
    state = State(
        bundle=bundle,
        targets=targets,
        engine=engine,
        keeper=keeper,
        delivery=Delivery(engine),
        decoder=ImageDecoder(
            manifest.input.height_px,
            manifest.input.width_px,
            settings.max_pixels,
            observe_seconds=metrics.decoded,
            canvas_px=engine.canvas_px,
            max_wait_s=settings.max_queue_s,
        ),
        metrics=metrics,
        lifecycle=lifecycle,
        settings=settings,
        admin_token=admin_token,
    )

    async def start_engine() -> None:
        try:
            await asyncio.to_thread(engine.start)
            await asyncio.to_thread(app.openapi)  # built and cached now: it would noticeably delay requests
        except Exception as error:
            logger.exception("the engine cannot start")
            lifecycle.fail(f"the engine did not start ({error})")
            on_started(error)
            return
        lifecycle.become_ready()
        if lifecycle.is_ready:
            on_started(None)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(start_engine())
        if engine.is_alive:  # a worker's: the engine is already warm, so never report it as not ready
            await asyncio.wait([starting])
        yield
        await starting
        await asyncio.to_thread(engine.drain, ENGINE_STOP_S)
        state.decoder.close()

    app = FastAPI(  # FastAPI's docs page loads scripts from another host; `page` serves one that does not
        title="ExitServe",
        version=manifest.version,
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # redirects would use the client's Host header, and never https
    )
    problems.install(app)
    classifier = Classifier(state)
    for routes in (
        classify_routes(classifier),
        stream_routes(classifier),
        batch_routes(classifier),
        budget_routes(state),
        status_routes(state),
    ):
        app.include_router(routes)
    page.install(app, state)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    desk = Desk(classifier)
    return LoggedGate(app, desk) if desk.has_log else Gate(app, desk)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's OpenAPI document, plus problem documents as error bodies and the admin token's security scheme."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schema = {"$ref": "#/components/schemas/ProblemDocument"}
        not_ready = {"description": "Not ready", "content": {problems.MEDIA_TYPE: {"schema": schema}}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                for status, response in operation["responses"].items():
                    if status >= "400" and "application/json" in response.get("content", {}):
                        response["content"][problems.MEDIA_TYPE] = response["content"].pop("application/json")
                if path not in ALWAYS_OPEN:  # any of these calls can be refused while stopping
                    operation["responses"].setdefault("503", not_ready)
        document["servers"] = [{"url": "./"}]  # relative, for proxies that add a path prefix
        document["components"]["securitySchemes"] = {"admin": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema
