"""Extensions for `st run`: images, and rules that OpenAPI cannot express. See test_interface.py."""

import io

import orjson
import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis import Case, DeserializationContext, GenerationMode, HookContext, Response

FORGIVING_MS = 30_000


def image(file_format: str) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((32, 32)).save(file, file_format)
    return file.getvalue()


for name in ("png", "jpeg", "webp", "bmp", "gif"):
    schemathesis.openapi.media_type(f"image/{name}", st.just(image(name)))


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, object]) -> None:
    """Drop one of two mutually exclusive parameters, and replace deadlines by one that suffices for an answer."""
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE or not case.query:
        return
    if "exit" in case.query:
        case.query.pop("min_confidence", None)
    if "deadline_ms" in case.query:
        case.query["deadline_ms"] = FORGIVING_MS


@schemathesis.deserializer("application/x-ndjson")
def last_line(context: DeserializationContext, response: Response) -> object:
    """Validate only the last line of a stream: the schema describes a line, and is checked against a single value."""
    *steps, last = [orjson.loads(line) for line in response.content.splitlines()]
    assert last["final"]
    assert not any(step["final"] for step in steps)
    return last
