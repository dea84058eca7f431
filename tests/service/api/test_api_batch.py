"""`/classify/batch`: an answer or a problem for every image, in order."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from time import sleep
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from service.api import answers
from service.api.delivery import Delivery
from service.engine.engine import Engine
from service.engine.rows import Answer, Options
from service.errors import EngineError, EngineOverloaded, EngineUnsound
from service.images.decoder import ImageDecoder
from tests.bundles import random_images
from tests.service.api.test_delivery import keep_busy
from tests.service.apps import PNG, Http, build_app, png, problem, serving
from tests.waiting import LIMIT_S, wait_until

IMAGES = random_images(12, seed=17)
BODIES = [png(image) for image in IMAGES]
MOST = 20


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[Http]:
    with serving(build_app(folder, budget_fraction=1.0, burst_images=1000, max_batch_images=MOST)) as client:
        yield client


def files(*bodies: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("image", (f"{i}.png", body, "image/png")) for i, body in enumerate(bodies)]


def batch(http: Http, query: str, *bodies: bytes) -> dict[str, Any]:
    response = http.post(f"/classify/batch{query}", files=files(*bodies))
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    answers.BatchAnswer.model_validate(document, strict=True)
    assert document["request_id"] == response.headers["x-request-id"]
    assert [item["filename"] for item in document["results"]] == [f"{i}.png" for i in range(len(bodies))]
    return document


def test_every_image_gets_its_own_answer_in_order(http: Http) -> None:
    document = batch(http, "?min_confidence=0.5&top_k=2", *BODIES)
    assert (document["answered"], document["failed"]) == (len(BODIES), 0)
    for item, body in zip(document["results"], BODIES, strict=True):
        alone = http.post("/classify?min_confidence=0.5&top_k=2", content=body, headers=PNG).json()
        assert item["problem"] is None
        for key in ("label", "confidence", "top_k", "exit", "reason", "mflops"):
            assert item["answer"][key] == alone[key]
    assert len({item["answer"]["confidence"] for item in document["results"]}) == len(BODIES)


def test_a_bad_image_gets_a_problem_and_the_others_answers(http: Http) -> None:
    counted = outcomes(http)
    document = batch(http, "", BODIES[0], b"no image", BODIES[1], BODIES[2][:50], b"")
    assert (document["answered"], document["failed"]) == (2, 3)
    kinds = [item["problem"] and item["problem"]["type"].rpartition(":")[2] for item in document["results"]]
    assert kinds == [None, "not-an-image", None, "broken-image", "empty-image"]
    for item in document["results"]:
        assert (item["answer"] is None) != (item["problem"] is None)
        if item["problem"]:
            assert item["problem"]["status"] == 400
            assert item["problem"]["instance"] == "/classify/batch"
    assert outcomes(http) == {**counted, "answered": counted["answered"] + 2, "invalid": counted["invalid"] + 3}


def outcomes(http: Http) -> dict[str, float]:
    prefix = 'exitserve_requests_total{outcome="'
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(prefix)]
    return {line.removeprefix(prefix).partition('"')[0]: float(line.split()[-1]) for line in lines}


def test_the_size_of_a_form_is_limited(http: Http) -> None:
    assert batch(http, "", *BODIES[:1] * MOST)["answered"] == MOST
    document = problem(http.post("/classify/batch", files=files(*BODIES[:1] * (MOST + 1))), 413, "too-many-images")
    assert document["limit_images"] == MOST


@pytest.mark.parametrize("call", ["/classify", "/classify/batch"])
@pytest.mark.parametrize("name", ["image", "other"])
def test_a_form_with_only_fields_is_refused_before_its_end(http: Http, call: str, name: str) -> None:
    """A small body with a hundred thousand fields would block all others; its broken end shows that it is not read."""
    body = b'--XX\r\nContent-Disposition: form-data; name="%b"\r\n\r\n\r\n' % name.encode() * 400
    response = http.post(call, content=body, headers={"Content-Type": "multipart/form-data; boundary=XX"})
    problem(response, 413, "too-many-images")


def test_bodies_that_are_no_form_of_images_are_refused(http: Http) -> None:
    response = http.post("/classify/batch", content=BODIES[0], headers=PNG)
    problem(response, 415, "unsupported-media-type")
    assert response.headers["accept-post"] == "multipart/form-data"
    problem(http.post("/classify/batch", files={"picture": ("a.png", BODIES[0])}), 422, "not-one-image")
    problem(http.post("/classify/batch?exit=0", files=files(BODIES[0])), 422, "bad-parameter")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [(EngineOverloaded(1024), 429, "overloaded"), (EngineUnsound("all 2 lanes hang"), 503, "not-ready")],
)
def test_if_no_image_can_be_admitted_the_whole_request_is_refused(
    http: Http, monkeypatch: pytest.MonkeyPatch, error: EngineError, status: int, kind: str
) -> None:
    def refuses(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "submit_to", refuses)
        response = http.post("/classify/batch", files=files(*BODIES[:3]))
        problem(response, status, kind)
        assert int(response.headers["retry-after"]) >= 1
        mixed = batch(http, "", BODIES[0], b"no image")
        assert [item["problem"]["status"] for item in mixed["results"]] == [status, 400]
    assert batch(http, "", *BODIES[:3])["answered"] == 3


@pytest.mark.parametrize("limit", [{"max_in_flight": 8}, {"max_queue_s": 1e-6}])
def test_no_image_is_refused_because_of_the_forms_others(folder: Path, limit: dict[str, Any]) -> None:
    """The form has many more images than the engine has room for, by number or by waiting time."""
    with serving(build_app(folder, **limit)) as http:
        for _ in range(2):
            assert batch(http, "", *BODIES * 3)["answered"] == 3 * len(BODIES)
        forms = [httpx.Request("POST", "http://x", files=files(*BODIES * 2)) for _ in range(3)]
        headers = {"Content-Type": "multipart/form-data; boundary=XX"}
        bodies = [form.read().replace(form.headers["content-type"][30:].encode(), b"XX") for form in forms]
        for response in http.post_all("/classify/batch", bodies, 3, headers=headers):  # at once
            assert response.json()["answered"] == 2 * len(BODIES)
        assert outcomes(http)["overloaded"] == 0


def test_an_image_without_room_waits_for_the_forms_others(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example when others fill the room between two of them, while some of the form's are in flight."""
    refused: list[int] = []
    submit_to = Engine.submit_to

    def refuses(engine: Engine, *args: Any, **options: Any) -> Any:
        in_flight = engine._admission.in_flight
        if in_flight >= 2:
            refused.append(in_flight)
            raise EngineOverloaded(in_flight)
        return submit_to(engine, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "submit_to", refuses)
        assert batch(http, "?exit=4", *BODIES)["answered"] == len(BODIES)
    assert refused
    assert len(refused) < 3 * len(BODIES), "each asks again when one has ended, and not before"


def test_an_image_that_cannot_be_decoded_yet_waits_for_the_forms_others(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example while others' large images are decoded: images that would wait too long are refused."""
    n_asked = 0
    decode = ImageDecoder.decode

    async def refuses(decoder: ImageDecoder, body: bytes, deadline_s: float) -> NDArray[np.uint8]:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 2:
            raise EngineOverloaded(8, 2.0)
        return await decode(decoder, body, deadline_s)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDecoder, "decode", refuses)
        assert batch(http, "", *BODIES)["answered"] == len(BODIES)
    assert n_asked == len(BODIES) + 1


def test_the_decoding_time_of_an_image_is_its_own(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that since the form had arrived. The clock advances by a second whenever it is read."""
    monkeypatch.setattr("service.api.batch.perf_counter", count().__next__)
    results = batch(http, "", *BODIES)["results"]
    assert [item["answer"]["timings"]["decode_ms"] for item in results] == [1000.0] * len(BODIES)


def test_every_answer_of_a_form_has_its_latency(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    def n_observed() -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("exitserve_request_seconds_count"))

    before, took = n_observed(), list[float]()
    monkeypatch.setattr(Engine, "took", lambda engine, seconds: took.append(seconds))
    results = batch(http, "", *BODIES, b"no image")["results"]
    assert n_observed() - before == len(BODIES)
    totals_ms = [item["answer"]["timings"]["total_ms"] for item in results[:-1]]
    assert sorted(totals_ms) == pytest.approx(sorted(1e3 * seconds for seconds in took), abs=1e-3)


@pytest.fixture
def narrow(folder: Path) -> Iterator[tuple[Http, Engine]]:
    """A server with room for eight images, of which a form may have four; and its engine."""
    engines: list[Engine] = []
    with serving(build_app(folder, keep=engines.append, max_in_flight=8)) as client:
        yield client, engines[0]


def test_images_that_cannot_be_decoded_yet_do_not_block_the_forms_others(
    narrow: tuple[Http, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting images once kept their turns, so the ones behind waited for a turn forever."""
    http, engine = narrow
    n_asked = 0
    decode = ImageDecoder.decode
    go_on = keep_busy(engine)

    async def refuses(decoder: ImageDecoder, body: bytes, deadline_s: float) -> NDArray[np.uint8]:
        nonlocal n_asked
        n_asked += 1
        if 2 <= n_asked <= 2 + decoder.n_threads:  # while the first is in work
            raise EngineOverloaded(8, 2.0)
        if n_asked > 2:
            go_on.set()
        return await decode(decoder, body, deadline_s)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDecoder, "decode", refuses)
        try:
            assert batch(http, "?deadline_ms=3000", *BODIES)["answered"] == len(BODIES)
        finally:
            go_on.set()


@contextmanager
def busy(engine: Engine) -> Iterator[None]:
    go_on = keep_busy(engine)
    try:
        yield
    finally:
        go_on.set()


def in_flight(engine: Engine) -> int:
    return engine._admission.in_flight


def test_a_long_form_leaves_room_for_others(narrow: tuple[Http, Engine]) -> None:
    http, engine = narrow
    with ThreadPoolExecutor() as pool:
        with busy(engine):
            form = pool.submit(batch, http, "", *BODIES * 2)
            wait_until("its first images are in work", lambda: in_flight(engine) == 4)
            alone = pool.submit(http.post, "/classify", content=BODIES[0], headers=PNG)
            wait_until("another client's is, too", lambda: in_flight(engine) == 5)
        assert alone.result(LIMIT_S).status_code == 200
        assert form.result(LIMIT_S)["answered"] == 2 * len(BODIES)


def test_images_that_wait_for_others_of_the_form_keep_their_deadlines(narrow: tuple[Http, Engine]) -> None:
    http, engine = narrow
    with ThreadPoolExecutor() as pool:
        with busy(engine):
            form = pool.submit(http.post, "/classify/batch?deadline_ms=200", files=files(*BODIES))
            wait_until("its first images are in work", lambda: in_flight(engine) == 4)
            sleep(0.3)
        document = form.result(LIMIT_S).json()
    assert [item["problem"]["status"] for item in document["results"]] == [504] * len(BODIES)
    assert engine.stats().submitted == 4, "the others have never come to the engine"


def test_a_bug_counts_for_every_image_and_abandons_the_others(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, given_up = outcomes(http), Counter[str]()

    async def answer(delivery: Delivery, image: NDArray[np.uint8], options: Options) -> Answer:
        if np.array_equal(image, IMAGES[1]):
            raise RuntimeError("a secret of the inside")
        try:
            return await asyncio.Future()
        except asyncio.CancelledError:
            given_up["cancelled"] += 1
            raise

    with monkeypatch.context() as patch:
        patch.setattr(Delivery, "answer", answer)
        document = problem(http.post("/classify/batch", files=files(*BODIES[:3])), 500, "internal-error")
        assert "secret" not in str(document)
        wait_until("the others are given up", lambda: given_up["cancelled"] == 2)
    assert outcomes(http) == {**counted, "failed": counted["failed"] + 3}
    assert batch(http, "", *BODIES[:3])["answered"] == 3


@pytest.mark.parametrize("path", ["/classify/batch", "/classify/stream", "/classify"])
@pytest.mark.parametrize("room", [1024, 8])
def test_a_client_that_leaves_abandons_all_its_images(folder: Path, path: str, room: int) -> None:
    engines: list[Engine] = []
    app = build_app(folder, keep=engines.append, max_in_flight=room)
    n_images = len(BODIES) if "batch" in path else 1
    form = httpx.Request("POST", f"http://127.0.0.1:8000{path}", files=files(*BODIES[:n_images]))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.lower(), value) for name, value in form.headers.raw],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    messages = [{"type": "http.request", "body": form.read(), "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    with serving(app) as client:
        go_on = keep_busy(engines[0])
        client.run(app(scope, receive, send))  # type: ignore[arg-type]
        go_on.set()
        stats = engines[0].stats()
        assert (stats.abandoned, stats.in_flight_rows) == (stats.submitted, 0)
        assert 1 <= stats.submitted <= n_images  # on a busy machine, the client may leave before the last is decoded
        assert stats.submitted <= room // 2  # and none that waited has followed
        assert sent[0]["status"] == 499
        assert outcomes(client)["abandoned"] == n_images
