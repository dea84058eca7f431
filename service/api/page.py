"""The pages at `/` and `/docs`: files that the browser runs, served from `service/web` under strict policies."""

import mimetypes
from os import PathLike, stat_result
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from service.api.access import access_routes
from service.api.state import State

WEB = Path(__file__).resolve().parents[1] / "web"
PREFIX = "/web"

# The pages need this server alone, and ask for nothing else. `blob:` is for pictures that a person gives.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# Swagger UI's style sheet has its icons inside.
DOCS_HEADERS = HEADERS | {"Content-Security-Policy": POLICY.replace("img-src 'self'", "img-src 'self' data:")}
# Asked for again each time, by ETag, so that a new server is never seen through an old page. What is vendored has its
# version in its path, and never changes.
REVALIDATED = "no-cache"
IMMUTABLE = "public, max-age=31536000, immutable"

# What a suffix means must not depend on the machine's own tables: browsers refuse modules of another type.
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".png": "image/png"}


class PageFiles(StaticFiles):
    """`StaticFiles` with the page's headers, and always whole: what it says to ranges that are none is no problem."""

    def file_response(
        self, full_path: str | PathLike[str], stat_result: stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        scope["headers"] = [field for field in scope["headers"] if field[0] != b"range"]  # read when it is sent
        response = super().file_response(full_path, stat_result, scope, status_code)
        vendored = "vendor" in Path(full_path).relative_to(WEB).parts
        headers = DOCS_HEADERS if Path(full_path) == WEB / "docs.html" else HEADERS
        caching = IMMUTABLE if vendored else REVALIDATED
        response.headers.update(headers | {"Cache-Control": caching, "Accept-Ranges": "none"})
        return response


def install(app: FastAPI, state: State) -> None:
    """Serve the pages at `/` and `/docs` of `app`, what they load below `/web`, and the call that `/` alone needs."""
    app.include_router(access_routes(state))
    for suffix, media_type in TYPES.items():
        mimetypes.add_type(media_type, suffix)
    files = PageFiles(directory=WEB)

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    async def docs(request: Request) -> Response:
        return await files.get_response("docs.html", request.scope)

    for path, endpoint in (("/", page), ("/docs", docs)):
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount(PREFIX, files, name="web")
