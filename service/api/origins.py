"""Cross-origin access (CORS): which origins' web pages may call this server from a browser."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.problems import Problem, respond

METHODS = ("GET", "POST")
FIELDS = ("Content-Type", "X-Request-ID", "traceparent")
PREFLIGHT_S = 3600  # how long browsers may cache the answer to a preflight request
OF_A_BODY = frozenset({"content-length", "content-type"})


class Origins(CORSMiddleware):
    """Allows pages of these origins to call the application; preflight requests of others get a problem document.

    Args:
        app: the application behind it.
        origins: allowed origins; `*` for all.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=FIELDS,
            expose_headers=("X-Request-ID", "Retry-After"),
            max_age=PREFLIGHT_S,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        why = bytes(response.body).decode().removeprefix("Disallowed CORS ")
        return _Refusal(why, {name: value for name, value in response.headers.items() if name not in OF_A_BODY})


class _Refusal(Response):
    """A problem document that is rendered when sent, because it names the request."""

    def __init__(self, why: str, headers: dict[str, str]) -> None:
        super().__init__(status_code=400)
        self._problem = Problem(
            400,
            "page-not-allowed",
            "Page not allowed",
            f"This cross-origin call is not allowed because of its {why}: --allow-origins lists the origins that may "
            f"call, by {' and '.join(METHODS)}, with the header fields {', '.join(FIELDS)}.",
            headers=headers,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(Request(scope), self._problem)(scope, receive, send)
