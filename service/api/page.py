"""The pages at `/` and `/docs`: static files from `service/web`, served with strict security headers."""

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

# The pages load nothing from other servers. `blob:` is for showing pictures that the user has chosen.
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
# Swagger UI's style sheet embeds its icons as data URLs.
DOCS_HEADERS = HEADERS | {"Content-Security-Policy": POLICY.replace("img-src 'self'", "img-src 'self' data:")}
# Revalidated by ETag on every load, so that a new server is never used through an old page. Vendored files have their
# version in their path and never change.
REVALIDATED = "no-cache"
IMMUTABLE = "public, max-age=31536000, immutable"

# Media types must not depend on the system's own tables: browsers refuse modules of another type.
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".png": "image/png"}


class PageFiles(StaticFiles):
    """`StaticFiles` with the pages' headers and without ranges, as its error for a bad range is no problem document."""

    def file_response(
        self, full_path: str | PathLike[str], stat_result: stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        scope["headers"] = [field for field in scope["headers"] if field[0] != b"range"]  # read when sending
        response = super().file_response(full_path, stat_result, scope, status_code)
        vendored = "vendor" in Path(full_path).relative_to(WEB).parts
        headers = DOCS_HEADERS if Path(full_path) == WEB / "docs.html" else HEADERS
        caching = IMMUTABLE if vendored else REVALIDATED
        response.headers.update(headers | {"Cache-Control": caching, "Accept-Ranges": "none"})
        return response


def install(app: FastAPI, state: State) -> None:
    """Serve the pages `/` and `/docs`, the files that they load from `/web`, and `/budget/access`, which `/` calls."""
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
