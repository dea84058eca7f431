"""`POST /classify`: one image in, one answer out. Raw bodies received whole take the fast path in `direct.py`."""

from time import perf_counter
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from service.api.answers import Classification, ProblemDocument
from service.api.bodies import FIELD, FORM_TYPE, IMAGE_TYPES, read_image
from service.api.documents import Documents, engine_problem, image_problem, outcome
from service.api.options import Asked, OptionReader
from service.api.plain_route import PlainRoute
from service.api.state import State
from service.engine.rows import Answer
from service.errors import EngineError
from service.images.decoder import ImageError
from service.logs import NOTES

STATUSES = (400, 408, 413, 415, 422, 429, 500, 503, 504)
IMAGE_PARTS = {FIELD: {"contentType": ", ".join(IMAGE_TYPES)}}  # of a form, as OpenAPI describes them
ABOUT_IMAGES = (
    "The image is the raw body or the field `image` of a form; its format is detected from its bytes. It may have any "
    "size: it is cropped to the network's aspect ratio around its centre, scaled with antialiasing and rotated as its "
    "EXIF orientation says, and transparent pixels are blended with white."
)


class Classifier:
    """Answers classification requests, and counts how each ended."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.documents = Documents(state.bundle.manifest)
        self.options = OptionReader(len(state.bundle.manifest.class_names), state.bundle.costs_mflops)

    async def respond(self, request: Request) -> Response:
        try:
            response = await self._classify(request)
        except Exception as error:
            self.state.metrics.count(outcome(error))
            raise
        self.state.metrics.count("answered")
        return response

    def begin(self, request: Request) -> Asked:
        """Check the server's state and read the options, before the body is read. The gate has checked for room."""
        self.state.require_open()
        return self.options.read(request.scope["query_string"])

    async def decode(self, body: bytes, deadline_s: float) -> NDArray[np.uint8]:
        try:
            return await self.state.decoder.decode(body, deadline_s)
        except ImageError as error:
            raise image_problem(error) from None
        except EngineError as error:
            raise engine_problem(error) from None

    async def _classify(self, request: Request) -> Response:
        state = self.state
        asked = self.begin(request)
        body = await read_image(request, state.settings.max_body_bytes, state.settings.body_timeout_s)
        started = perf_counter()
        options = asked.at(started)
        image = await self.decode(body, options.deadline_s)
        decoded = perf_counter()
        try:
            answer = await state.delivery.classify(image, options, request.receive)
        except EngineError as error:
            raise engine_problem(error) from None
        scope = request.scope
        document = self.answered(answer, started, decoded, scope["request_id"], scope.get(NOTES))
        return Response(orjson.dumps(document), media_type="application/json")

    def answered(
        self, answer: Answer, started_s: float, decoded_s: float, request_id: str, notes: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Record an answer in the metrics and the access log notes, if any, and return its JSON document.

        Args:
            started_s, decoded_s: when its body, and its pixels, were available (`perf_counter`).
        """
        total_s = perf_counter() - started_s
        self.state.responded(answer.exit, total_s)
        if notes is not None:
            notes |= {
                "exit": answer.exit,
                "reason": answer.reason,
                "mflops": answer.mflops,
                "confidence": answer.confidence,
            }
        return self.documents.answer(answer, decoded_s - started_s, total_s, request_id)


def classify_routes(classifier: Classifier) -> APIRouter:
    router = APIRouter(tags=["classify"], route_class=PlainRoute)

    @router.post(
        "/classify",
        response_model=Classification,
        summary="Classify one image",
        description=ABOUT_IMAGES,
        openapi_extra={"parameters": classifier.options.parameters(), "requestBody": one_image()},
        responses={status: {"model": ProblemDocument} for status in STATUSES},
    )
    async def classify(request: Request) -> Response:
        return await classifier.respond(request)

    return router


def one_image() -> dict[str, object]:
    """The request body of one image, as OpenAPI describes it."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {
        "type": "object",
        "required": [FIELD],
        "properties": {FIELD: {"type": "string", "format": "binary", "description": "one image file"}},
    }
    content = {FORM_TYPE: {"schema": form, "encoding": IMAGE_PARTS}, **dict.fromkeys(IMAGE_TYPES, binary)}
    return {"required": True, "content": content}
