"""The HTTP face around a real engine and a tiny bundle: what is answered, what is refused, and how."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any

import numpy as np
import orjson
import pytest
from httpx import Response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.api import answers, problems
from service.api.bodies import IMAGE_TYPES
from service.engine import Engine
from tests.bundles import CLASS_NAMES, random_images, tiny_bundle
from tests.service.apps import PNG, Http, build_app, encoded, png, serving
from tests.service.test_images import png_bomb, webp_bomb

IMAGES = random_images(8, seed=11)
BODIES = [png(image) for image in IMAGES]
REFUSED_WITHIN_S = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[Http]:
    with serving(build_app(folder, max_body_bytes=100_000)) as client:
        yield client


def problem(response: Response, status: int, kind: str) -> dict[str, Any]:
    """Check that a response is a whole problem document of that kind, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == problems.TYPE_PREFIX + kind
    assert document["status"] == status
    assert document["title"]
    assert len(document["detail"]) > 20
    assert document["instance"] == response.request.url.path
    assert document["request_id"] == response.headers["x-request-id"]
    return document


# --- classify ---------------------------------------------------------------------------------------------------


def test_an_answer_says_everything(http: Http) -> None:
    response = http.post("/classify", content=BODIES[0], headers=PNG)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer["label"] == CLASS_NAMES[answer["class_id"]]
    assert 0 < answer["confidence"] <= 1
    assert [set(ranked) for ranked in answer["top_k"]] == [{"label", "class_id", "confidence"}] * 5
    assert answer["top_k"][0] == {key: answer[key] for key in ("label", "class_id", "confidence")}
    confidences = [ranked["confidence"] for ranked in answer["top_k"]]
    assert confidences == sorted(confidences, reverse=True)
    model = http.get("/model").json()
    assert answer["exits"] == len(model["exits"]) == 4
    assert answer["mflops"] == pytest.approx(model["exits"][answer["exit"] - 1]["executed_mflops"])
    assert answer["full_mflops"] == model["exits"][-1]["executed_mflops"]
    assert answer["reason"] in ("confident", "final", "budget")
    assert (answer["model"], answer["version"]) == (model["name"], model["version"])
    assert answer["timings"]["total_ms"] >= answer["timings"]["decode_ms"] > 0
    assert answer["timings"]["stages_ms"] > 0
    assert answer["request_id"] == response.headers["x-request-id"]


def test_a_client_may_name_its_request(http: Http) -> None:
    named = http.post("/classify", content=BODIES[0], headers={**PNG, "X-Request-ID": "trace-7f.1"})
    assert named.json()["request_id"] == named.headers["x-request-id"] == "trace-7f.1"
    for foolish in ("a" * 65, "a b", "<script>", ""):
        response = http.post("/classify", content=BODIES[0], headers={**PNG, "X-Request-ID": foolish})
        assert response.json()["request_id"] != foolish
    first, second = (http.post("/classify", content=BODIES[0], headers=PNG).json()["request_id"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("file_format", "content_type"),
    [
        ("PNG", "image/png"),
        ("PNG", "image/jpeg"),
        ("PNG", "application/octet-stream"),
        ("WEBP", "image/webp"),
        ("BMP", "image/bmp"),
        ("BMP", "image/x-ms-bmp; charset=binary"),
    ],
)
def test_lossless_files_of_one_image_get_one_answer(http: Http, file_format: str, content_type: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    body = encoded(IMAGES[0], file_format, **options)
    answer = pinned(http, body, content_type)
    assert answer == pinned(http, BODIES[0], "image/png")


def pinned(http: Http, body: bytes, content_type: str) -> list[tuple[int, float]]:
    """What an answer says of the image, at whichever exit it left: comparable where nothing else is in flight."""
    http.put("/budget", json={"fraction": 1.0})
    response = http.post("/classify?top_k=10", content=body, headers={"Content-Type": content_type})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert len(answer["top_k"]) == 10
    assert sum(ranked["confidence"] for ranked in answer["top_k"]) == pytest.approx(1)
    return [(ranked["class_id"], ranked["confidence"]) for ranked in answer["top_k"]]


@pytest.mark.parametrize("file_format", ["JPEG", "GIF", "PNG"])
def test_photographs_of_other_sizes_and_types_are_answered(http: Http, file_format: str) -> None:
    picture = np.random.default_rng(5).integers(0, 255, (150, 211, 3), dtype=np.uint8)
    response = http.post(
        "/classify", content=encoded(picture, file_format), headers={"Content-Type": f"image/{file_format.lower()}"}
    )
    assert response.status_code == 200, response.text


def test_a_form_is_taken_as_well(http: Http) -> None:
    http.put("/budget", json={"fraction": 1.0})
    files = {"note": (None, "passed over"), "image": ("cat.png", BODIES[1], "image/png")}
    by_form = http.post("/classify", files=files).json()
    by_body = http.post("/classify", content=BODIES[1], headers=PNG).json()
    assert by_form["label"] == by_body["label"]


@pytest.mark.parametrize("query", ["topk=3", "top_k=3&deadline=1", "TOP_K=1", "%ff=1"])
def test_unknown_query_parameters_are_refused_with_the_known_ones(http: Http, query: str) -> None:
    document = problem(http.post(f"/classify?{query}", content=BODIES[0], headers=PNG), 422, "bad-parameter")
    assert document["known"] == ["top_k"]
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
    "animated": (encoded(IMAGES[0], "GIF", save_all=True, append_images=FRAMES), 422, "animated-image"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("by_form", [False, True])
def test_a_bad_image_gets_a_problem_at_once_and_the_server_goes_on(http: Http, name: str, by_form: bool) -> None:
    body, status, kind = BAD_IMAGES[name]
    seconds = []
    for _ in range(5):  # the machine may be busy with something else
        started = perf_counter()
        if by_form:
            response = http.post("/classify", files={"image": ("cat.png", body, "image/png")})
        else:
            response = http.post("/classify", content=body, headers=PNG)
        seconds.append(perf_counter() - started)
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


def test_a_body_too_large_is_refused_by_its_length_and_by_its_count(http: Http) -> None:
    body = bytes(100_001)
    document = problem(http.post("/classify", content=body, headers=PNG), 413, "body-too-large")
    assert document["limit_bytes"] == 100_000

    async def chunks() -> AsyncIterator[bytes]:  # sent without a length
        for _ in range(11):
            yield body[:10_000]

    problem(http.post("/classify", content=chunks(), headers=PNG), 413, "body-too-large")
    exactly = png(IMAGES[0]) + bytes(100_000 - len(BODIES[0]))
    assert http.post("/classify", content=exactly, headers=PNG).status_code == 200


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
def test_whatever_is_sent_is_answered_or_refused_with_a_reason(
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


# --- everything else that can be asked --------------------------------------------------------------------------


def test_what_is_not_there_and_what_is_asked_wrongly(http: Http) -> None:
    problem(http.get("/nowhere"), 404, "not-found")
    response = http.get("/classify")
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"
    problem(http.delete("/budget"), 405, "method-not-allowed")
    for path in ("/model", "/budget", "/budget/frontier"):
        problem(http.get(path + "?x=1"), 422, "bad-parameter")


def test_status_calls(http: Http) -> None:
    assert http.get("/healthz").json() == {"status": "alive"}
    assert http.get("/readyz").json() == {"status": "ready"}
    index = http.get("/")
    assert index.headers["content-type"].startswith("text/html")
    for path in ("/docs", "/budget", "/model", "/metrics"):
        assert f'href="{path}"' in index.text
        assert http.get(path).status_code == 200


def test_the_model_is_described_without_private_parts(http: Http) -> None:
    model = http.get("/model").json()
    assert model["class_names"] == CLASS_NAMES
    assert model["input"]["height_px"] == 32
    assert "files" not in model
    assert "stages" not in model


def test_a_bug_is_a_problem_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = build_app(folder)

    async def broken(*args: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr("service.api.delivery.Delivery.classify", broken)
    with serving(app) as client:
        document = problem(client.post("/classify", content=BODIES[0], headers=PNG), 500, "internal-error")
        assert "secret" not in orjson.dumps(document).decode()
        assert 'exitserve_requests_total{outcome="failed"} 1.0' in client.get("/metrics").text


def test_before_it_is_warm_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_start, start = Event(), Engine.start

    def start_when_told(engine: Engine) -> None:
        may_start.wait()
        start(engine)

    monkeypatch.setattr(Engine, "start", start_when_told)
    with serving(build_app(folder), ready=False) as client:
        try:
            assert client.get("/healthz").status_code == 200
            for response in (client.get("/readyz"), client.get("/budget")):
                assert "warming up" in problem(response, 503, "not-ready")["detail"]
            refused = client.post("/classify", content=BODIES[0], headers=PNG)
            problem(refused, 503, "not-ready")
            assert refused.headers["retry-after"] == "1"
            assert client.get("/metrics").status_code == 200
        finally:
            may_start.set()


def test_the_openapi_document_is_true(http: Http) -> None:
    document = http.get("/openapi.json").json()
    operations = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == {
        ("POST", "/classify"),
        ("GET", "/budget"),
        ("PUT", "/budget"),
        ("GET", "/budget/frontier"),
        ("GET", "/model"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
    }
    for (_, path), operation in operations.items():
        assert operation["summary"]
        for status, response in operation["responses"].items():
            if status >= "400":
                assert set(response["content"]) == {"application/problem+json"}, path
    classify = operations["POST", "/classify"]
    assert set(classify["requestBody"]["content"]) == {"multipart/form-data", *IMAGE_TYPES}
    assert [parameter["name"] for parameter in classify["parameters"]] == ["top_k"]
    assert {"400", "413", "415", "422", "429", "503"} <= set(classify["responses"])
    for reference in references(document):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
    # What it says of an answer is what an answer is.
    for path, model, sent in (
        ("/classify", "Classification", http.post("/classify", content=BODIES[0], headers=PNG).json()),
        ("/budget", "BudgetState", http.get("/budget").json()),
        ("/budget/frontier", "FrontierCurve", http.get("/budget/frontier").json()),
    ):
        described = document["components"]["schemas"][model]
        assert set(described["properties"]) == set(described["required"]) == set(sent), path
        getattr(answers, model).model_validate(sent, strict=True)
    for example in operations["PUT", "/budget"]["requestBody"]["content"]["application/json"]["examples"].values():
        answers.BudgetRequest.model_validate(example["value"])


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)
