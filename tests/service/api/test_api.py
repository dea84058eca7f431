"""The HTTP API with a real engine and a tiny bundle: answers and status calls."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from service.api import answers
from service.api.bodies import IMAGE_TYPES
from service.api.options import KNOWN
from service.engine.engine import Engine
from service.runners.base import RunnerError
from tests.bundles import CLASS_NAMES, random_images, read_manifest, write_manifest
from tests.service.apps import PNG, Http, build_app, encoded, png, problem, serving
from tests.waiting import wait_until

IMAGES = random_images(8, seed=11)
BODIES = [png(image) for image in IMAGES]
REFUSED_WITHIN_S = 0.1


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[Http]:
    with serving(build_app(folder, max_body_bytes=100_000)) as client:
        yield client


def test_an_answer_has_all_fields(http: Http) -> None:
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


def test_a_client_may_choose_the_request_id(http: Http) -> None:
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
        ("PNG", "Image/PNG"),
        ("PNG", "application/octet-stream"),
        ("WEBP", "image/webp"),
        ("BMP", "image/bmp"),
        ("BMP", "image/x-ms-bmp; charset=binary"),
    ],
)
def test_lossless_files_of_one_image_get_equal_answers(http: Http, file_format: str, content_type: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    body = encoded(IMAGES[0], file_format, **options)
    answer = pinned(http, body, content_type)
    assert answer == pinned(http, BODIES[0], "image/png")


def pinned(http: Http, body: bytes, content_type: str) -> list[tuple[int, float]]:
    """The parts of an answer that only depend on the image, comparable while nothing else is in flight."""
    http.put("/budget", json={"fraction": 1.0})
    response = http.post("/classify?top_k=10", content=body, headers={"Content-Type": content_type})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert len(answer["top_k"]) == 10
    total = sum(ranked["confidence"] for ranked in answer["top_k"])
    assert total == pytest.approx(1, abs=10 * 0.5e-6)  # each is rounded to six digits
    return [(ranked["class_id"], ranked["confidence"]) for ranked in answer["top_k"]]


@pytest.mark.parametrize("file_format", ["JPEG", "GIF", "PNG"])
def test_photographs_of_other_sizes_and_types_are_answered(http: Http, file_format: str) -> None:
    picture = np.random.default_rng(5).integers(0, 255, (150, 211, 3), dtype=np.uint8)
    response = http.post(
        "/classify", content=encoded(picture, file_format), headers={"Content-Type": f"image/{file_format.lower()}"}
    )
    assert response.status_code == 200, response.text


def test_forms_are_accepted(http: Http) -> None:
    http.put("/budget", json={"fraction": 1.0})
    files = {"note": (None, "passed over"), "image": ("cat.png", BODIES[1], "image/png")}
    by_form = http.post("/classify", files=files).json()
    by_body = http.post("/classify", content=BODIES[1], headers=PNG).json()
    assert by_form["label"] == by_body["label"]


def test_status_calls(http: Http) -> None:
    assert http.get("/healthz").json() == {"status": "alive"}
    assert http.get("/readyz").json() == {"status": "ready"}
    index = http.get("/").text
    for path in ("docs", "model", "metrics"):
        assert f'href="{path}"' in index
        assert http.get(f"/{path}").status_code == 200


def test_the_model_is_described_without_private_parts(http: Http) -> None:
    model = http.get("/model").json()
    assert model["class_names"] == CLASS_NAMES
    assert model["input"]["height_px"] == 32
    assert "files" not in model
    assert "stages" not in model


def test_a_models_training_record_may_have_numbers_of_any_size(bundle_path: Path) -> None:
    manifest = read_manifest(bundle_path)
    manifest["training"] = {"seed": 2**127, "loss": float("nan")}
    write_manifest(bundle_path, manifest)
    with serving(build_app(bundle_path)) as http:
        assert http.get("/model").json()["training"] == {"seed": 2**127, "loss": None}


def test_during_warm_up_it_is_not_ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_engine_that_cannot_start_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(engine: Engine) -> None:
        raise RunnerError("stage 3 does not run")

    monkeypatch.setattr(Engine, "start", fails)
    told: list[Exception | None] = []
    with serving(build_app(folder, on_started=told.append), ready=False) as client:
        wait_until("it is told", lambda: told)
        assert isinstance(told[0], RunnerError)
        assert "stage 3 does not run" in problem(client.get("/readyz"), 503, "not-ready")["detail"]
        problem(client.post("/classify", content=BODIES[0], headers=PNG), 503, "not-ready")


def test_a_server_stopped_during_its_start_is_never_ready(folder: Path) -> None:
    told: list[Exception | None] = []
    app = build_app(folder, on_started=told.append)
    app.lifecycle.drain()
    with serving(app, ready=False):
        pass  # to its end it waits for its engine, which is ready then
    assert not told


def test_a_server_whose_engine_is_gone_is_not_ready(folder: Path) -> None:
    engines: list[Engine] = []
    with serving(build_app(folder, keep=engines.append)) as client:
        assert client.get("/readyz").status_code == 200
        engines[0].drain(1.0)
        assert "engine has stopped" in problem(client.get("/readyz"), 503, "not-ready")["detail"]
        problem(client.post("/classify", content=BODIES[0], headers=PNG), 503, "not-ready")
        assert client.get("/healthz").status_code == 200
        assert client.get("/metrics").status_code == 200


def test_the_openapi_document_matches_the_api(http: Http) -> None:
    document = http.get("/openapi.json").json()
    operations = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == {
        ("POST", "/classify"),
        ("POST", "/classify/stream"),
        ("POST", "/classify/batch"),
        ("GET", "/budget"),
        ("PUT", "/budget"),
        ("GET", "/budget/frontier"),
        ("GET", "/budget/access"),
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
    for path in ("/classify", "/classify/stream", "/classify/batch"):
        assert tuple(parameter["name"] for parameter in operations["POST", path]["parameters"]) == KNOWN
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
