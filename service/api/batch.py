"""`POST /classify/batch`: several images in one form; every one gets an answer or a problem of its own."""

import asyncio
from time import perf_counter
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from service.api.answers import BatchAnswer, ProblemDocument
from service.api.bodies import FIELD, FORM_TYPE, Upload, read_images
from service.api.classify import IMAGE_PARTS, STATUSES, Classifier
from service.api.delivery import Watch
from service.api.documents import engine_problem, outcome
from service.api.options import Asked
from service.api.plain_route import PlainRoute
from service.api.problems import Problem
from service.errors import EngineError
from service.logs import NOTES

Result = dict[str, Any] | Problem


class Batcher:
    """Answers one form of images; counts how each of them ended."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.state = classifier.state

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
        """One for every upload, in order; raises ClientDisconnect where the client has left: all have been given up."""
        started = perf_counter()
        tasks: list[asyncio.Task[Result]] = []
        request_id = request.scope["request_id"]
        # As many at a time as there are threads: a form of large pictures is not to keep all others from them.
        turns = asyncio.Semaphore(self.state.decoder.n_threads)
        with Watch(request.receive, lambda: [task.cancel() for task in tasks]) as watch:
            try:
                for upload in uploads:
                    tasks.append(asyncio.create_task(self._result(upload, asked, started, turns, request_id)))
                    await asyncio.sleep(0)  # small images are decoded on this loop: others have their turn in between
                return await asyncio.gather(*tasks)
            except BaseException:  # cancelled, or a fault of the server's own: then no image goes on
                for task in tasks:
                    task.cancel()
                if watch.client_left:
                    raise ClientDisconnect from None
                raise

    async def _result(
        self, upload: Upload, asked: Asked, started: float, turns: asyncio.Semaphore, request_id: str
    ) -> Result:
        options = asked.at(started)
        try:
            async with turns:
                decoding = perf_counter()
                image = await self.classifier.decode(upload.body, options.deadline_s)
                decoded = perf_counter()
            answer = await self.state.delivery.answer(image, options)
        except EngineError as error:
            return engine_problem(error)
        except Problem as problem:
            return problem
        total_s = perf_counter() - started
        self.state.responded(answer.exit, total_s)
        return self.classifier.documents.answer(answer, decoded - decoding, total_s, request_id)

    def _response(self, request: Request, uploads: list[Upload], results: list[Result]) -> Response:
        problems = [result for result in results if isinstance(result, Problem)]
        if len(problems) == len(results) and {problem.status for problem in problems} in ({429}, {503}):
            raise problems[0]  # to come back later is advice for the whole request
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
        description="A form with several fields `image`. Every image gets an answer or a problem, in order, and the "
        "query's options hold for each; the response is 200 if the form could be read, unless the server can take none "
        "of them now (429, 503).",
        openapi_extra={
            "parameters": batcher.classifier.options.parameters(),
            "requestBody": {"required": True, "content": {FORM_TYPE: {"schema": form, "encoding": IMAGE_PARTS}}},
        },
        responses={status: {"model": ProblemDocument} for status in STATUSES},
    )
    async def batch(request: Request) -> Response:
        return await batcher.respond(request)

    return router
