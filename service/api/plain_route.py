"""Routes that FastAPI matches and documents but does not process, for calls made thousands of times a second."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute


class PlainRoute(APIRoute):
    """A route whose endpoint takes the request and returns the response.

    It has nothing to inject, validate or serialise, and FastAPI's checking for that takes a tenth of a request's time.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler
