"""Reads request bodies within limits of size and time, and extracts the images."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from service.api.problems import SMALLER_IMAGE, Problem, body_too_large

# Accepted content types; the actual format is detected from the first bytes of the image.
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif")
ALIASES = frozenset(
    {"image/jpg", "image/pjpeg", "image/apng", "image/x-png", "image/x-ms-bmp", "application/octet-stream"}
)
RAW_TYPES = ALIASES.union(IMAGE_TYPES)
FORM_TYPE = "multipart/form-data"
FIELD = "image"
# Limit on form fields besides images: each takes the event loop 10 us, and a body has room for hundreds of thousands.
MOST_OTHER_FIELDS = 100


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a form."""

    filename: str | None
    body: bytes


async def read_body(request: Request, limit_bytes: int, timeout_s: float, remedy: str = SMALLER_IMAGE) -> bytes:
    """Read the whole body.

    Args:
        remedy: advice for the client if the body is longer than `limit_bytes`.

    Raises:
        Problem: 413 if its announced or actual size exceeds `limit_bytes`; 408 if it takes longer than `timeout_s`.
        ClientDisconnect: the client disconnected while sending.
    """
    announced = request.headers.get("content-length", "0")
    # The HTTP parser has already refused lengths that are not numbers.
    if announced.isascii() and announced.isdigit() and int(announced) > limit_bytes:
        raise body_too_large(limit_bytes, remedy)
    try:
        async with asyncio.timeout(timeout_s):
            return await _receive(request, limit_bytes, remedy)
    except TimeoutError:
        raise Problem(
            408,
            "body-too-slow",
            "Request body too slow",
            f"The body did not arrive completely within {timeout_s:g} s: send it again, faster, or send a smaller one.",
            headers={"Connection": "close"},
        ) from None


async def _receive(request: Request, limit_bytes: int, remedy: str) -> bytes:
    chunks: list[bytes] = []
    n_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk: bytes = message.get("body", b"")
        n_bytes += len(chunk)
        if n_bytes > limit_bytes:
            raise body_too_large(limit_bytes, remedy)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def read_image(request: Request, limit_bytes: int, timeout_s: float) -> bytes:
    """Read the bytes of the one image in a request: its raw body, or the field `image` of a multipart form.

    Raises:
        Problem: as `read_body` and `image_field`; 415 for other content types.
    """
    sent = media_type(request)
    if sent in RAW_TYPES:
        return await read_body(request, limit_bytes, timeout_s)
    if sent != FORM_TYPE:
        raw = (*IMAGE_TYPES, "application/octet-stream")
        raise _not_taken(sent, f"one of {', '.join(raw)} as the body, or {FORM_TYPE} with a field", (*raw, FORM_TYPE))
    boundary = _boundary(request)
    return image_field(await read_body(request, limit_bytes, timeout_s), boundary)


async def read_images(request: Request, limit_bytes: int, timeout_s: float, most: int) -> list[Upload]:
    """Read the images in a multipart form: every field `image`, in order.

    Raises:
        Problem: as `read_image`, but 413 for more than `most` images, and 422 only for none.
    """
    if (sent := media_type(request)) != FORM_TYPE:
        raise _not_taken(sent, f"{FORM_TYPE} with several fields", (FORM_TYPE,))
    boundary = _boundary(request)
    images = _parse(await read_body(request, limit_bytes, timeout_s), boundary, most).images
    if not images:
        raise _not_one("no field", f"one for each image (curl -F {FIELD}=@cat.png -F {FIELD}=@dog.png)")
    if len(images) > most:
        raise _too_many(f"{len(images)} images", most)
    return images


def image_field(body: bytes, boundary: bytes) -> bytes:
    """Return the bytes of the field `image` of a multipart form; other fields are ignored.

    Raises:
        Problem: 400 for a malformed form, 422 unless it has exactly one field `image`, 413 for far too many fields.
    """
    images = _parse(body, boundary, most=1).images
    if len(images) != 1:
        raise _not_one(f"{len(images)} fields" if images else "no field", f"one (curl -F {FIELD}=@cat.png)")
    return images[0].body


def media_type(request: Request) -> str:
    """The media type of the request's body, in lower case; empty if not given."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported(detail: str, headers: Mapping[str, str] | None = None) -> Problem:
    """A 415 for a content type that the call does not accept."""
    return Problem(415, "unsupported-media-type", "Unsupported media type", detail, headers)


def _boundary(request: Request) -> bytes:
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary")
    if not boundary:
        raise _broken_form("its content type names no boundary")
    return boundary


def _parse(body: bytes, boundary: bytes, most: int) -> "_Form":
    form = _Form(most)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _broken_form(str(error)) from None
    if not form.ended:
        raise _broken_form("it ends before its closing boundary")
    return form


def _not_taken(sent: str, wanted: str, accepted: tuple[str, ...]) -> Problem:
    what = sent or "A body without a content type"
    if sent == "application/x-www-form-urlencoded":
        what += f" (curl's default; set another by -H 'Content-Type: {accepted[0]}')"
    return unsupported(f"{what} is not accepted: send {wanted} {FIELD!r}.", {"Accept-Post": ", ".join(accepted)})


def _not_one(found: str, wanted: str) -> Problem:
    return Problem(422, "not-one-image", "Not one image", f"The form has {found} called {FIELD!r}: send {wanted}.")


def _too_many(found: str, most: int) -> Problem:
    return Problem(
        413,
        "too-many-images",
        "Too many images",
        f"The form has {found}, and at most {most} images are accepted: send them in several requests, or raise "
        "--max-batch-images for /classify/batch.",
        limit_images=most,
    )


def _broken_form(why: str) -> Problem:
    return Problem(
        400,
        "broken-form",
        "Broken multipart form",
        f"The multipart form cannot be parsed ({why}): let your client library build it and set the content type.",
    )


class _Form:
    """Collects the fields `image` through the parser's callbacks; raises Problem for far too many fields.

    Args:
        most: number of images allowed; the caller checks it, except that `MOST_OTHER_FIELDS` more fields are refused.
    """

    def __init__(self, most: int) -> None:
        self.images: list[Upload] = []
        self._most, self._n_parts = most, 0
        self.ended = False
        self._name = self._value = b""
        self._wanted = False
        self._filename: str | None = None
        self._chunks: list[bytes] = []

    def callbacks(self) -> dict[str, object]:
        names = ("part_begin", "header_field", "header_value", "header_end", "part_data", "part_end", "end")
        return {f"on_{name}": getattr(self, name) for name in names}

    def part_begin(self) -> None:
        self._n_parts += 1
        if self._n_parts > self._most + MOST_OTHER_FIELDS:
            raise _too_many(f"more than {self._most + MOST_OTHER_FIELDS} fields", self._most)
        self._wanted, self._filename, self._chunks = False, None, []
        self._name = self._value = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            options = parse_options_header(self._value)[1]
            self._wanted = options.get(b"name") == FIELD.encode()
            filename = options.get(b"filename")
            self._filename = None if filename is None else filename.decode("utf-8", "replace")
        self._name = self._value = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted:
            self._chunks.append(data[start:end])

    def part_end(self) -> None:
        if self._wanted:
            self.images.append(Upload(self._filename, b"".join(self._chunks)))

    def end(self) -> None:
        self.ended = True
