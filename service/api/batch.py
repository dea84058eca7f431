"""`POST /classify/batch`: several images in one form, each with its own answer or problem."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from service.api.answers import BatchAnswer, ProblemDocument
from service.api.bodies import FIELD, FORM_TYPE, Upload, read_images
from service.api.classify import IMAGE_PARTS, STATUSES, Classifier
from service.api.delivery import Watch
from service.api.documents import engine_problem, image_problem, outcome
from service.api.options import Asked
from service.api.plain_route import PlainRoute
from service.api.problems import Problem
from service.api.siblings import Siblings
from service.engine.rows import Options
from service.errors import EngineError, EngineOverloaded, EngineTooLate
from service.images.decoder import ImageError
from service.logs import NOTES

T = TypeVar("T")
Result = dict[str, Any] | Problem


@dataclass(frozen=True, slots=True)
class _Form:
    """State that the images of one form share."""

    started_s: float  # when its last byte had arrived (`perf_counter`)
    options: Options
    request_id: str
    turns: asyncio.Semaphore  # limits concurrent decoding
    siblings: Siblings


class Batcher:
    """Answers forms of images, and counts how each image ended.

    A form may hold more images than the engine has room for. Only some of them are in flight at a time: an image is
    not refused because its siblings fill the room, but waits until one of them has ended.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.state = classifier.state
        self._n_processes = max(1, self.state.settings.http_workers)
        self._n_forms = 0  # in flight

    async def respond(self, request: Request) -> Response:
        metrics, settings = self.state.metrics, self.state.settings
        uploads: list[Upload] = []
        try:
            asked = self.classifier.begin(request)
            uploads = await read_images(
                request, settings.max_body_bytes, settings.body_timeout_s, settings.max_batch_images
            )
            results = await self._results(request, uploads, asked)
        except Exception as error:
            for _ in uploads or (None,):
                metrics.count(outcome(error))
            raise
        for result in results:
            metrics.count(outcome(result) if isinstance(result, Problem) else "answered")
        return self._response(request, uploads, results)

    async def _results(self, request: Request, uploads: list[Upload], asked: Asked) -> list[Result]:
        """Return one result per upload, in order; raises ClientDisconnect, with all images abandoned."""
        this = asyncio.current_task()
        assert this is not None
        started_s = perf_counter()
        # One decode per thread at a time, so that one form of large pictures does not monopolise decoding.
        turns, siblings = asyncio.Semaphore(self.state.decoder.n_threads), Siblings()
        form = _Form(started_s, asked.at(started_s), request.scope["request_id"], turns, siblings)
        tasks: list[asyncio.Task[Result]] = []
        self._n_forms += 1
        with Watch(request.receive, this.cancel) as watch:
            try:
                for upload in uploads:
                    while not self._has_place(siblings) and await siblings.wait(form.options.deadline_s):
                        pass
                    siblings.begin_one()
                    tasks.append(asyncio.create_task(self._result(upload, form)))
                    await asyncio.sleep(0)  # small images are decoded on this loop: let other tasks run in between
                return await asyncio.gather(*tasks)
            except BaseException:  # cancelled, or a bug: abandon all images
                for task in tasks:
                    task.cancel()
                if watch.client_left:
                    this.uncancel()
                    raise ClientDisconnect from None
                raise
            finally:
                self._n_forms -= 1

    def _has_place(self, siblings: Siblings) -> bool:
        """Whether another image of a form may be in flight.

        The first always may. Further ones are limited to the form's share of half the engine's room, divided by the
        processes and this process's forms. The other half is for single images, which forms would otherwise crowd out.
        """
        if not siblings.n_in_work:
            return True
        room_rows, _ = self.state.engine.room
        share = room_rows // (2 * self._n_processes * self._n_forms)
        return siblings.n_in_work < share and self.state.engine.has_room

    async def _result(self, upload: Upload, form: _Form) -> Result:
        try:
            if perf_counter() >= form.options.deadline_s:  # it passed while the image waited for its siblings
                raise EngineTooLate
            image, decode_s = await self._once_there_is_room(form, self._decode, upload.body, form)
            answer = await self._once_there_is_room(form, self.state.delivery.answer, image, form.options)
        except ImageError as error:
            return image_problem(error)
        except EngineError as error:
            return engine_problem(error)
        finally:
            form.siblings.end_one()
        total_s = perf_counter() - form.started_s
        self.state.responded(answer.exit, total_s)
        return self.classifier.documents.answer(answer, decode_s, total_s, form.request_id)

    async def _decode(self, body: bytes, form: _Form) -> tuple[NDArray[np.uint8], float]:
        """Wait for a turn and decode an image; returns uint8 [H, W, 3] and the seconds that decoding took.

        EngineOverloaded ends the turn, since the siblings that the image then waits for may be waiting for a turn.
        """
        async with form.turns:
            began_s = perf_counter()
            image = await self.state.decoder.decode(body, form.options.deadline_s)
            return image, perf_counter() - began_s

    async def _once_there_is_room(
        self, form: _Form, step: Callable[..., Coroutine[Any, Any, T]], *arguments: object
    ) -> T:
        """Run a step for an image; if there is no room for it, wait for a sibling to end and try again."""
        while True:
            try:
                return await step(*arguments)
            except EngineOverloaded:
                if form.siblings.n_in_work == 1:  # only this image: other requests fill the room
                    raise
            if not await form.siblings.step_back(form.options.deadline_s):
                raise EngineTooLate

    def _response(self, request: Request, uploads: list[Upload], results: list[Result]) -> Response:
        problems = [result for result in results if isinstance(result, Problem)]
        if len(problems) == len(results) and {problem.status for problem in problems} in ({429}, {503}):
            raise problems[0]  # the advice to retry later applies to the whole request
        if (notes := request.scope.get(NOTES)) is not None:
            notes.update({"images": len(results), "answered": len(results) - len(problems)})
        path, request_id = request.url.path, request.scope["request_id"]
        items = [
            {
                "filename": upload.filename,
                "answer": None if isinstance(result, Problem) else result,
                "problem": result.document(path, request_id) if isinstance(result, Problem) else None,
            }
            for upload, result in zip(uploads, results, strict=True)
        ]
        document = {
            "results": items,
            "answered": len(results) - len(problems),
            "failed": len(problems),
            "request_id": request_id,
        }
        return Response(orjson.dumps(document, default=str), media_type="application/json")


def batch_routes(classifier: Classifier) -> APIRouter:
    router = APIRouter(tags=["classify"], route_class=PlainRoute)
    batcher = Batcher(classifier)
    form = {
        "type": "object",
        "required": [FIELD],
        "properties": {
            FIELD: {
                "type": "array",
                "items": {"type": "string", "format": "binary"},
                "minItems": 1,
                "maxItems": classifier.state.settings.max_batch_images,
                "description": "one image file each",
            }
        },
    }

    @router.post(
        "/classify/batch",
        response_model=BatchAnswer,
        summary="Classify several images",
        description="Takes a form with several fields `image`. The query's options apply to every image. Each gets an "
        "answer or a problem, in the order of the form. The status is 200 if the form could be read, unless the server "
        "can accept none of the images now (429, 503).",
        openapi_extra={
            "parameters": batcher.classifier.options.parameters(),
            "requestBody": {"required": True, "content": {FORM_TYPE: {"schema": form, "encoding": IMAGE_PARTS}}},
        },
        responses={status: {"model": ProblemDocument} for status in STATUSES},
    )
    async def batch(request: Request) -> Response:
        return await batcher.respond(request)

    return router
