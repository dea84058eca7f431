"""Puts the HTTP face together, around an engine that it warms up, and stops at the end."""

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
from service.api.lifecycle import ALWAYS_OPEN, Lifecycle, Names
from service.api.ports import EnginePort, KeeperPort, MetricsPort
from service.api.room import Room
from service.api.state import State
from service.api.status import status_routes
from service.api.stream import stream_routes
from service.budget.target import Targets
from service.images.decoder import ImageDecoder
from service.settings import Settings

logger = logging.getLogger(__name__)

ABOUT = """\
Classifies images with a network that stops early: every image leaves at the first exit that is sure, and the
average compute per image is one number that you set (`PUT /budget`).

MFLOPs are millions of multiply-adds, as the early-exit literature counts them. Errors are problem documents
(RFC 9457): `detail` names cause and remedy, `type` is stable.
"""
ENGINE_STOP_S = 1.0  # requests have been waited for before; what is left has nobody to hear it


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
        engine: not yet started: the application warms it up once it listens, so that `/readyz` can tell.
        metrics: of the requests here, and of `engine`.
        targets, keeper: what budgets may be asked for, and who keeps the one that was.
        admin_token: that changes need; without one, clients of this machine may.
        on_started: called on the event loop once the engine is ready, or with the error that kept it from starting; not
            where the server was told to stop meanwhile.
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
            await asyncio.to_thread(app.openapi)  # once and now: it takes long enough for requests to notice
        except Exception as error:
            logger.exception("the engine cannot start")
            lifecycle.fail(f"its engine did not start ({error})")
            on_started(error)
            return
        lifecycle.become_ready()
        if lifecycle.is_ready:
            on_started(None)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(start_engine())
        if engine.is_alive:  # it is another process's, and warm: nobody is to hear that it is not
            await asyncio.wait([starting])
        yield
        await starting
        await asyncio.to_thread(engine.drain, ENGINE_STOP_S)
        state.decoder.close()

    app = FastAPI(  # its own page for the document asks another host for scripts; `page` has one that does not
        title="ExitServe",
        version=manifest.version,
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would send clients to the host that they named, and never by https
    )
    problems.install(app)
    classifier, room, names = Classifier(state), Room(state), Names()
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
    has_log = settings.access_log == "json"
    desk = Desk(classifier, room, names, has_log)
    most_held_bytes = max(settings.max_held_bytes, settings.max_body_bytes)
    make_gate = LoggedGate if has_log else Gate
    return make_gate(app, lifecycle, room, names, desk, most_held_bytes, settings.origins)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with what it cannot know: errors are problem documents, and the admin token."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schema = {"$ref": "#/components/schemas/ProblemDocument"}
        not_ready = {"description": "Not ready", "content": {problems.MEDIA_TYPE: {"schema": schema}}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                for status, response in operation["responses"].items():
                    if status >= "400" and "application/json" in response.get("content", {}):
                        response["content"][problems.MEDIA_TYPE] = response["content"].pop("application/json")
                if path not in ALWAYS_OPEN:  # once it is stopping, whatever the call
                    operation["responses"].setdefault("503", not_ready)
        document["servers"] = [{"url": "./"}]  # from where the document lies: also behind a proxy, under its path
        document["components"]["securitySchemes"] = {"admin": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema
