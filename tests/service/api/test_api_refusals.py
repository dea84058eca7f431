"""Refusals of the HTTP API: each at once, with a problem document that has the reason, and the server goes on."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from time import process_time

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.api.room import SAME_FOR_S
from service.engine.engine import Engine
from tests.bundles import random_images
from tests.service.apps import PNG, Http, build_app, encoded, png, problem, serving
from tests.service.images.test_images import png_bomb, webp_bomb
from tests.waiting import LIMIT_S

IMAGES = random_images(8, seed=11)
BODIES = [png(image) for image in IMAGES]
REFUSED_WITHIN_S = 0.1  # CPU time


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[Http]:
    with serving(build_app(folder, max_body_bytes=100_000)) as client:
        yield client


@pytest.mark.parametrize("query", ["topk=3", "top_k=3&deadline=1", "TOP_K=1", "%ff=1"])
def test_unknown_query_parameters_are_refused_with_the_known_ones(http: Http, query: str) -> None:
    document = problem(http.post(f"/classify?{query}", content=BODIES[0], headers=PNG), 422, "bad-parameter")
    assert document["known"] == ["top_k", "exit", "min_confidence", "max_mflops", "deadline_ms"]
    assert "top_k" in document["detail"]


@pytest.mark.parametrize(
    "query",
    [
        "top_k=0",
        "top_k=11",
        "top_k=-1",
        "top_k=many",
        "top_k=",
        "top_k=1.0",
        "top_k=1&top_k=1",
        "top_k=" + "9" * 5000,
        "top_k=%C2%B2",
    ],
)
def test_bad_query_values_are_refused(http: Http, query: str) -> None:
    document = problem(http.post(f"/classify?{query}", content=BODIES[0], headers=PNG), 422, "bad-parameter")
    assert "1 to 10" in document["detail"] or "twice" in document["detail"]


FRAMES = [Image.fromarray(image) for image in IMAGES[:3]]
BAD_IMAGES = {
    "empty": (b"", 400, "empty-image"),
    "text named .png": (b"not an image at all", 400, "not-an-image"),
    "truncated": (BODIES[0][: len(BODIES[0]) // 2], 400, "broken-image"),
    "header alone": (BODIES[0][:33], 400, "broken-image"),
    "100-megapixel bomb": (png_bomb(10_000), 413, "image-too-large"),
    "webp bomb": (webp_bomb(16_000), 413, "image-too-large"),
    "tiff": (encoded(IMAGES[0], "TIFF"), 400, "not-an-image"),
    "animated": (encoded(IMAGES[0], "GIF", save_all=True, append_images=FRAMES), 415, "animated-image"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("by_form", [False, True])
def test_a_bad_image_gets_a_problem_at_once_and_the_server_goes_on(http: Http, name: str, by_form: bool) -> None:
    body, status, kind = BAD_IMAGES[name]
    seconds = []
    for _ in range(5):  # the process may be busy otherwise
        started = process_time()
        if by_form:
            response = http.post("/classify", files={"image": ("cat.png", body, "image/png")})
        else:
            response = http.post("/classify", content=body, headers=PNG)
        seconds.append(process_time() - started)
    problem(response, status, kind)
    assert min(seconds) < REFUSED_WITHIN_S
    assert http.post("/classify", content=BODIES[0], headers=PNG).status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/json", "image/svg+xml", "image/tiff", "", "nonsense"]
)
def test_other_content_types_are_refused(http: Http, content_type: str) -> None:
    response = http.post("/classify", content=BODIES[0], headers={"Content-Type": content_type} if content_type else {})
    document = problem(response, 415, "unsupported-media-type")
    assert "image/png" in document["detail"]
    assert "image/png" in response.headers["accept-post"]


def test_curls_default_content_type_is_refused_with_the_fix(http: Http) -> None:
    own = {"Content-Type": "application/x-www-form-urlencoded"}  # of curl --data-binary
    for call, header in (("/classify", "image/png"), ("/classify/batch", "multipart/form-data")):
        document = problem(http.post(call, content=BODIES[0], headers=own), 415, "unsupported-media-type")
        assert f"-H 'Content-Type: {header}'" in document["detail"]
    document = problem(http.put("/budget", content=b'{"fraction": 0.5}', headers=own), 415, "unsupported-media-type")
    assert "-H 'Content-Type: application/json'" in document["detail"]


def test_too_large_bodies_are_refused_by_declared_and_by_actual_length(http: Http) -> None:
    body = bytes(100_001)
    document = problem(http.post("/classify", content=body, headers=PNG), 413, "body-too-large")
    assert document["limit_bytes"] == 100_000

    async def chunks() -> AsyncIterator[bytes]:  # sent without a length
        for _ in range(11):
            yield body[:10_000]

    problem(http.post("/classify", content=chunks(), headers=PNG), 413, "body-too-large")
    exactly = png(IMAGES[0]) + bytes(100_000 - len(BODIES[0]))
    assert http.post("/classify", content=exactly, headers=PNG).status_code == 200


DISPOSITION = 'Content-Disposition: form-data; name="image"; filename="a.png"'
FORM = b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + BODIES[0] + b"\r\n--XX--\r\n"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "kind"),
    [
        (FORM, "multipart/form-data", 400, "broken-form"),
        (FORM, "multipart/form-data; boundary=", 400, "broken-form"),
        (FORM, "multipart/form-data; boundary=YY", 400, "broken-form"),
        (FORM, "multipart/form-data; boundary=" + "X" * 300, 400, "broken-form"),
        (FORM[:-30], "multipart/form-data; boundary=XX", 400, "broken-form"),
        (b"", "multipart/form-data; boundary=XX", 400, "broken-form"),
        (FORM.replace(b'"image"', b'"picture"'), "multipart/form-data; boundary=XX", 422, "not-one-image"),
        (
            FORM.replace(b"--XX--", b"--XX")[:-2] + b"\r\n" + FORM[6:],
            "multipart/form-data; boundary=XX",
            422,
            "not-one-image",
        ),
        (b"--XX--\r\n", "multipart/form-data; boundary=XX", 422, "not-one-image"),
    ],
)
def test_a_bad_form_is_refused(http: Http, body: bytes, content_type: str, status: int, kind: str) -> None:
    problem(http.post("/classify", content=body, headers={"Content-Type": content_type}), status, kind)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.one_of(st.binary(max_size=200), st.sampled_from([BODIES[0], FORM])),
    damage=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
    content_type=st.sampled_from(["image/png", "multipart/form-data; boundary=XX", "image/gif", "text/plain"]),
    query=st.one_of(st.just(""), st.sampled_from(["top_k=2", "top_k=a", "x", "&&", "top_k=2&x=%"])),
)
def test_any_body_is_answered_or_refused_with_a_reason(
    http: Http, body: bytes, damage: list[tuple[int, int]], content_type: str, query: str
) -> None:
    sent = bytearray(body)
    for where, value in damage:
        if sent:
            sent[where % len(sent)] = value
    response = http.post(f"/classify?{query}", content=bytes(sent), headers={"Content-Type": content_type})
    assert response.status_code == 200 or 400 <= response.status_code < 500
    if response.status_code != 200:
        assert response.headers["content-type"] == "application/problem+json"


def test_a_bug_is_a_problem_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = build_app(folder)

    async def broken(*args: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr("service.api.delivery.Delivery.classify", broken)
    with serving(app) as client:
        document = problem(client.post("/classify", content=BODIES[0], headers=PNG), 500, "internal-error")
        assert "secret" not in orjson.dumps(document).decode()
        assert 'exitserve_requests_total{outcome="failed"} 1.0' in client.get("/metrics").text


def test_unknown_paths_and_wrong_methods(http: Http) -> None:
    problem(http.get("/nowhere"), 404, "not-found")
    response = http.get("/classify")
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"
    problem(http.delete("/budget"), 405, "method-not-allowed")
    problem(http.post("/classify/", content=BODIES[0], headers=PNG), 404, "not-found")  # nobody is sent elsewhere
    assert http.delete("/budget").headers["allow"] == "GET, PUT, HEAD"
    described = http.get("/openapi.json").json()["paths"]
    for path in ("/model", "/budget", "/budget/frontier", "/budget/access"):
        problem(http.get(path + "?x=1"), 422, "bad-parameter")
        assert {"422", "503"} <= described[path]["get"]["responses"].keys()


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/model", "/budget", "/web/main.js"])
def test_every_get_route_answers_head(http: Http, path: str) -> None:
    head, whole = http.request("HEAD", path), http.get(path)
    assert head.status_code == whole.status_code == 200
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_the_total_size_of_bodies_is_limited(folder: Path) -> None:
    form, sent = f"--XX\r\n{DISPOSITION}\r\n\r\n".encode(), {"Content-Type": "multipart/form-data; boundary=XX"}
    with serving(build_app(folder, max_body_bytes=60_000, max_held_bytes=100_000)) as http:
        first_waits, go_on = Event(), Event()

        async def slow() -> AsyncIterator[bytes]:
            yield form + BODIES[0].ljust(55_000, b"\0")
            first_waits.set()
            await asyncio.to_thread(go_on.wait)
            yield b"\r\n--XX--\r\n"

        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(http.post, "/classify", content=slow(), headers=sent)
            assert first_waits.wait(LIMIT_S)
            large = BODIES[0].ljust(55_000, b"\0")
            for call in ("/classify", "/classify/stream"):
                refused = http.post(call, content=large, headers=PNG)
                assert "100,000 bytes" in problem(refused, 429, "overloaded")["detail"]
                assert refused.headers["retry-after"] == "1"
            assert http.post("/classify", content=BODIES[0], headers=PNG).status_code == 200
            go_on.set()
            assert first.result(LIMIT_S).status_code == 200
        assert http.post("/classify", content=large, headers=PNG).status_code == 200


def test_requests_in_flight_are_bounded_too(folder: Path) -> None:
    with serving(build_app(folder, max_in_flight=1)) as http:
        first_waits, go_on = Event(), Event()

        async def slow() -> AsyncIterator[bytes]:
            yield BODIES[0]
            first_waits.set()
            await asyncio.to_thread(go_on.wait)

        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(http.post, "/classify", content=slow(), headers=PNG)
            assert first_waits.wait(LIMIT_S)
            document = problem(http.post("/classify", content=BODIES[0], headers=PNG), 429, "overloaded")
            assert "overloaded: 1 requests are in flight, as many as it takes. Send it again" in document["detail"]
            go_on.set()
            assert first.result(LIMIT_S).status_code == 200


def test_overload_is_refused_with_retry_after_before_the_body_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[Engine] = []
    with serving(build_app(folder, keep=engines.append)) as client:
        admission = engines[0]._admission
        monkeypatch.setattr(admission, "room_rows", 0)
        monkeypatch.setattr(admission, "in_flight", 300)
        monkeypatch.setattr(admission, "row_s", 0.0081)
        response = client.post("/classify", content=b"never read", headers=PNG)
        document = problem(response, 429, "overloaded")
        assert response.headers["retry-after"] == "3"
        assert document["retry_after_s"] == pytest.approx(2.43)
        assert "2.4 s" in document["detail"]
        problem(client.get("/classify"), 405, "method-not-allowed")  # it has no image
        monkeypatch.undo()
        assert client.post("/classify", content=BODIES[0], headers=PNG).status_code == 200


def test_a_server_that_cannot_run_its_stages_is_not_ready(folder: Path) -> None:
    engines: list[Engine] = []
    with serving(build_app(folder, keep=engines.append)) as client:
        guard = engines[0]._loop.guard

        def unsound(why: str | None) -> None:
            guard.unsound = why

        engines[0].ask(lambda: unsound("all 2 lanes hang")).result(30)
        engines[0].stats()  # asked next, answered once the engine has followed
        for response in (client.get("/readyz"), client.post("/classify", content=BODIES[0], headers=PNG)):
            assert "2 lanes hang" in problem(response, 503, "not-ready")["detail"]
        assert "exitserve_ready 0.0" in client.get("/metrics").text
        engines[0].ask(lambda: unsound(None)).result(30)
        engines[0].stats()  # asked next, answered once the engine has followed
        assert client.get("/readyz").status_code == 200
        assert client.post("/classify", content=BODIES[0], headers=PNG).status_code == 200


def test_the_predicted_wait_is_renewed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []
    room = build_app(folder, keep=engines.append).room
    admission, now_s = engines[0]._admission, 100.0
    admission.in_flight, admission.room_rows, admission.row_s = 10, 10, 0.1
    monkeypatch.setattr("service.api.room.monotonic", lambda: now_s)
    first = room.problem()
    assert first is not None
    assert first.extensions == {"retry_after_s": 1.0}
    admission.row_s = 0.2
    assert room.problem() is first  # whose body is kept as it was written
    now_s += SAME_FOR_S
    second = room.problem()
    assert second is not None
    assert second.extensions == {"retry_after_s": 2.0}
    admission.in_flight = 9
    assert room.problem() is None
