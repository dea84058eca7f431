"""Errors as RFC 9457 problem documents: each states the cause and the remedy."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.errors import EngineError
from service.logs import NOTES

logger = logging.getLogger(__name__)

TYPE_PREFIX = "urn:exitserve:problem:"
MEDIA_TYPE = "application/problem+json"
CLIENT_LEFT = 499  # for the log only, as in nginx: the client has disconnected
ID_PLACE = os.urandom(16).hex()  # placeholder for the request id; random, so that no request contains it


class Problem(Exception):  # noqa: N818 (the name that RFC 9457 gives it)
    """An error that is answered with a problem document.

    Args:
        status: HTTP status code.
        kind: stable name for programs, the last part of the document's `type`.
        title: the same for every problem of one kind.
        detail: cause and remedy in this case.
        headers: HTTP headers of the response.
        extensions: further members of the document (RFC 9457, section 3.2).
    """

    def __init__(
        self,
        status: int,
        kind: str,
        title: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        **extensions: Any,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.title, self.detail = status, kind, title, detail
        self.headers = dict(headers or {})
        self.extensions = extensions
        self._written: tuple[str, bytes, list[bytes]] | None = None  # see `write`

    def document(self, path: str, request_id: str) -> dict[str, Any]:
        return {
            "type": TYPE_PREFIX + self.kind,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": path,
            "request_id": request_id,
            **self.extensions,
        }

    def body(self, path: str, request_id: str) -> bytes:
        # `default=str`: unusual input in an extension must not make serialisation fail.
        return orjson.dumps(self.document(path, request_id), default=str)

    def write(self, path: str, request_id: str) -> tuple[bytes, bytes]:
        """Return its header fields in wire format and its body, both cached for the latest path."""
        if self._written is None or self._written[0] != path:
            fields = {"content-type": MEDIA_TYPE, **self.headers}
            lines = "".join(f"{name.lower()}: {value}\r\n" for name, value in fields.items())
            self._written = path, lines.encode("latin-1"), self.body(path, ID_PLACE).split(ID_PLACE.encode())
        return self._written[1], request_id.encode().join(self._written[2])

    def response(self, path: str, request_id: str) -> Response:
        return Response(self.body(path, request_id), self.status, headers=self.headers, media_type=MEDIA_TYPE)


SMALLER_IMAGE = "send a smaller image, or raise --max-body-bytes"


def body_too_large(limit_bytes: int, remedy: str = SMALLER_IMAGE) -> Problem:
    return Problem(
        413,
        "body-too-large",
        "Request body too large",
        f"The body is larger than the {limit_bytes:,} bytes that this call accepts: {remedy}.",
        limit_bytes=limit_bytes,
    )


def broken_request() -> Problem:
    return Problem(
        400,
        "broken-request",
        "Broken request",
        "The data received is not a valid HTTP/1.1 request: use an HTTP client library. (TLS? This port speaks plain "
        "HTTP.)",
    )


def head_too_large(limit_bytes: int) -> Problem:
    return Problem(
        431,
        "head-too-large",
        "Request head too large",
        f"The request's target and header fields are longer than {limit_bytes:,} bytes: send fewer or shorter ones.",
        limit_bytes=limit_bytes,
    )


def internal_error(request_id: str) -> Problem:
    return Problem(
        500,
        "internal-error",
        "Internal error",
        f"The server failed on this request. Report it with request id {request_id}, which is also in its log.",
    )


def not_ready(detail: str) -> Problem:
    return Problem(503, "not-ready", "Not ready", detail, headers={"Retry-After": "1"})


def respond(request: Request, problem: Problem) -> Response:
    if (notes := request.scope.get(NOTES)) is not None:
        notes.update({"problem": problem.kind})
    return problem.response(request.url.path, request.scope.get("request_id", ""))


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return respond(request, error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 404:
        problem = Problem(404, "not-found", "Not found", f"There is nothing at {path!r}: /docs lists all calls.")
    elif error.status_code == 405:
        # The exception has only the methods of the first matching route; the OpenAPI document has those of all.
        documented = request.app.openapi()["paths"].get(path)
        methods = [*map(str.upper, documented or ()), *(["HEAD"] if "get" in (documented or ()) else [])]
        allowed = ", ".join(methods) or (error.headers or {}).get("Allow", "GET, HEAD")
        problem = Problem(
            405,
            "method-not-allowed",
            "Method not allowed",
            f"{path} does not support {method}: use {allowed}.",
            headers={"Allow": allowed},
        )
    else:
        problem = Problem(error.status_code, "http-error", "Request refused", str(error.detail))
    problem.headers = {**(error.headers or {}), **problem.headers}
    return respond(request, problem)


async def _on_leaving(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _on_silent_engine(request: Request, error: Exception) -> Response:
    """For calls that query the engine, such as `/budget`; `documents.py` has the problems of classifications."""
    return respond(request, not_ready(f"The engine cannot be queried: {error}. Try again, or use another server."))


async def _on_bug(request: Request, error: Exception) -> Response:
    # No traceback here: Starlette re-raises the error after this answer, and the server logs it.
    request_id = request.scope.get("request_id", "")
    logger.error("request %s failed: %s", request_id, type(error).__name__)
    return respond(request, internal_error(request_id))


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a problem document, except a client's disconnect."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_leaving)
    app.add_exception_handler(EngineError, _on_silent_engine)
    app.add_exception_handler(Exception, _on_bug)
