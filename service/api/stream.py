"""`POST /classify/stream`: one JSON line per exit, sent as the image passes it."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from time import perf_counter
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.api.answers import LastStep, ProblemDocument, Step
from service.api.bodies import read_image
from service.api.classify import ABOUT_IMAGES, STATUSES, Classifier, one_image
from service.api.documents import engine_problem, finite, outcome
from service.api.plain_route import PlainRoute
from service.api.problems import Problem, internal_error, not_ready
from service.engine.rows import Answer
from service.engine.rows import Step as HeadStep
from service.errors import EngineError
from service.logs import NOTES
from service.tally import Outcome

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/x-ndjson"


class Lines(Response):
    """A response that sends each line as soon as it is available."""

    media_type = MEDIA_TYPE

    def __init__(self, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self.lines = lines
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # nginx would buffer the lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self.lines) as lines:
            async for line in lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Streamer:
    """Answers requests with streams of JSON lines, and counts how each request ended.

    An error before the first line is answered with its own status. A later one is sent as the last line.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.state = classifier.state

    async def respond(self, request: Request) -> Response:
        documents = self._documents(request)
        try:
            first = await anext(documents)
        except Exception as error:
            self.state.metrics.count(outcome(error))
            raise
        return Lines(self._lines(first, documents, request))

    async def _lines(
        self, first: dict[str, Any], documents: AsyncGenerator[dict[str, Any], None], request: Request
    ) -> AsyncGenerator[bytes, None]:
        metrics = self.state.metrics
        ended: Outcome = "abandoned"  # unless the stream is completed
        try:
            async with aclosing(documents):
                yield _line(first)
                async for document in documents:
                    yield _line(document)
                ended = "answered"
        except ClientDisconnect:
            pass
        except Problem as problem:
            ended = outcome(problem)
            yield _problem_line(problem, request)
        except asyncio.CancelledError:
            if not self.state.lifecycle.is_cut_off:
                raise
            cut_off = not_ready(self.state.lifecycle.detail)
            ended = outcome(cut_off)
            yield _problem_line(cut_off, request)
        except Exception:  # a bug: the same problem as if it had occurred before the first line
            ended = "failed"
            request_id = request.scope["request_id"]
            logger.exception("request %s failed after its first line", request_id)
            yield _problem_line(internal_error(request_id), request)
        finally:
            metrics.count(ended)

    async def _documents(self, request: Request) -> AsyncGenerator[dict[str, Any], None]:
        state, documents = self.state, self.classifier.documents
        asked = self.classifier.begin(request)
        body = await read_image(request, state.settings.max_body_bytes, state.settings.body_timeout_s)
        started = perf_counter()
        options = asked.at(started, steps=True)
        image = await self.classifier.decode(body, options.deadline_s)
        decoded = perf_counter()
        steps: AsyncIterator[HeadStep | Answer] = state.delivery.follow(image, options, request.receive)
        try:
            async with aclosing(steps):  # type: ignore[type-var]
                async for step in steps:
                    if isinstance(step, HeadStep):
                        yield documents.step(step)
                        continue
                    answer = self.classifier.answered(
                        step, started, decoded, request.scope["request_id"], request.scope.get(NOTES)
                    )
                    yield {**answer, "score": finite(step.score), "threshold": finite(step.threshold), "final": True}
        except EngineError as error:
            raise engine_problem(error) from None


def _line(document: dict[str, Any]) -> bytes:
    return orjson.dumps(document, default=str, option=orjson.OPT_APPEND_NEWLINE)


def _problem_line(problem: Problem, request: Request) -> bytes:
    return _line({**problem.document(request.url.path, request.scope["request_id"]), "final": True})


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema, without definitions: the OpenAPI document has them already, for `/classify`."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs")
    return schema


def stream_routes(classifier: Classifier) -> APIRouter:
    router = APIRouter(tags=["classify"], route_class=PlainRoute)
    streamer = Streamer(classifier)
    schema = {"oneOf": [_schema(Step), _schema(LastStep)]}

    @router.post(
        "/classify/stream",
        summary="Classify one image, with a result from every exit",
        description="Sends a JSON line for each exit that the image goes on from, as it does so. The last line is the "
        "answer (`final` is true) or, after an error, a problem document. " + ABOUT_IMAGES,
        openapi_extra={"parameters": streamer.classifier.options.parameters(), "requestBody": one_image()},
        response_class=Response,
        responses={
            200: {"content": {MEDIA_TYPE: {"schema": schema}}},
            **{status: {"model": ProblemDocument} for status in STATUSES},
        },
    )
    async def stream(request: Request) -> Response:
        return await streamer.respond(request)

    return router
