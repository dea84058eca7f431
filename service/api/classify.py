"""`POST /classify`: one image in, one answer out. The hot route: it parses no more than it must."""

from time import perf_counter
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from service.api.answers import Classification, ProblemDocument
from service.api.bodies import FIELD, IMAGE_TYPES, read_image
from service.api.delivery import ClientLeft
from service.api.problems import Problem, not_ready
from service.api.queries import integer, read_query
from service.api.state import State
from service.images import ImageError
from service.metrics import Outcome
from service.rows import Answer, EngineDraining, EngineError, EngineOverloaded, Options

KNOWN = ("top_k",)
DEFAULT_TOP_K = 5
TITLES = {
    "empty-image": "Empty body",
    "not-an-image": "Not an image",
    "broken-image": "Broken image",
    "image-too-large": "Image too large",
    "animated-image": "Animated image",
}
STATUSES = {"image-too-large": 413, "animated-image": 422}  # the others are 400
CLIENT_LEFT = Response(status_code=499)  # nobody reads it; nginx's number, for the access log


class Classifier:
    """Answers one request; counts how it ended."""

    def __init__(self, state: State) -> None:
        self.state = state
        manifest = state.bundle.manifest
        self.class_names = manifest.class_names
        self.n_exits = len(manifest.exits)
        self.fixed = {
            "exits": self.n_exits,
            "full_mflops": manifest.exits[-1].executed_mflops,
            "model": manifest.name,
            "version": manifest.version,
        }
        self.default_options = Options(top_k=min(DEFAULT_TOP_K, len(self.class_names)))

    async def respond(self, request: Request) -> Response:
        try:
            response = await self._classify(request)
        except (ClientLeft, ClientDisconnect):
            self.state.metrics.count("abandoned")
            return CLIENT_LEFT
        except Problem as problem:
            self.state.metrics.count(_outcome(problem))
            raise
        except Exception:
            self.state.metrics.count("failed")
            raise
        self.state.metrics.count("answered")
        return response

    async def _classify(self, request: Request) -> Response:
        state = self.state
        state.require_ready()
        # Before the body is read: what waits there is bounded too.
        if state.lifecycle.requests_in_flight > state.settings.max_in_flight:
            raise _overloaded(f"{state.settings.max_in_flight} requests are in work")
        options = self._options(request.scope["query_string"])
        body = await read_image(request, state.settings.max_body_bytes, state.settings.body_timeout_s)
        started = perf_counter()
        try:
            image = await state.decoder.decode(body)
            decoded = perf_counter()
            answer = await state.delivery.classify(image, options, request.receive)
        except ImageError as error:
            raise Problem(STATUSES.get(error.kind, 400), error.kind, TITLES[error.kind], str(error)) from None
        except EngineError as error:
            raise _engine_problem(error) from None
        total_s = perf_counter() - started
        state.metrics.responded(answer.exit, total_s)
        document = self._document(answer, decoded - started, total_s, request.scope["request_id"])
        return Response(orjson.dumps(document), media_type="application/json")

    def _options(self, query_string: bytes) -> Options:
        if not query_string:
            return self.default_options
        query = read_query(query_string, KNOWN)
        if "top_k" not in query:
            return self.default_options
        return Options(top_k=integer("top_k", query["top_k"], 1, len(self.class_names), KNOWN))

    def _document(self, answer: Answer, decode_s: float, total_s: float, request_id: str) -> dict[str, Any]:
        """The answer as `Classification` describes it."""
        names = self.class_names
        return {
            "label": answer.label,
            "class_id": answer.class_id,
            "confidence": round(answer.confidence, 6),
            "top_k": [{"label": names[i], "class_id": i, "confidence": round(share, 6)} for i, share in answer.top_k],
            "exit": answer.exit,
            "reason": answer.reason,
            "mflops": answer.mflops,
            **self.fixed,
            "timings": {
                "decode_ms": round(decode_s * 1e3, 3),
                "queue_ms": round(answer.queue_ms, 3),
                "stages_ms": round(answer.compute_ms, 3),
                "total_ms": round(total_s * 1e3, 3),
            },
            "request_id": request_id,
        }


def _engine_problem(error: EngineError) -> Problem:
    if isinstance(error, EngineOverloaded):
        return Problem(
            429,
            "overloaded",
            "Overloaded",
            f"Nothing is wrong with the request: {error}.",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, EngineDraining):
        return not_ready(f"The server takes no new work, {error}: use another one.")
    return Problem(
        500,
        "engine-error",
        "Engine error",
        f"The image could not be run, {error}: try again, and see the server's log.",
    )


def _overloaded(why: str) -> Problem:
    detail = f"Nothing is wrong with the request, but {why}: send it again in a moment, or raise --max-in-flight."
    return Problem(429, "overloaded", "Overloaded", detail, headers={"Retry-After": "1"})


def _outcome(problem: Problem) -> Outcome:
    if problem.status == 429:
        return "overloaded"
    if problem.status == 503:
        return "unavailable"
    return "invalid" if problem.status < 500 else "failed"


def classify_routes(state: State) -> APIRouter:
    router = APIRouter(tags=["classify"])
    classifier = Classifier(state)
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {
        "type": "object",
        "required": [FIELD],
        "properties": {FIELD: {"type": "string", "format": "binary", "description": "one image file"}},
    }

    @router.post(
        "/classify",
        response_model=Classification,
        summary="Classify one image",
        description="The image is the raw body or the field `image` of a form; its bytes decide what it is. It may "
        "have any size: it is cut to the network's aspect ratio around its centre, scaled with antialiasing, turned as "
        "its EXIF orientation says, and laid on white where it is transparent.",
        openapi_extra={
            "parameters": [
                {
                    "name": "top_k",
                    "in": "query",
                    "required": False,
                    "description": "how many of the most probable classes to list",
                    "schema": {
                        "type": "integer",
                        "minimum": 1,
                        "maximum": len(classifier.class_names),
                        "default": classifier.default_options.top_k,
                    },
                }
            ],
            "requestBody": {
                "required": True,
                "content": {"multipart/form-data": {"schema": form}, **dict.fromkeys(IMAGE_TYPES, binary)},
            },
        },
        responses={status: {"model": ProblemDocument} for status in (400, 408, 413, 415, 422, 429, 500, 503)},
    )
    async def classify(request: Request) -> Response:
        return await classifier.respond(request)

    return router
