"""Cross-origin requests: preflights and headers. `test_origins.py` uses a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.apps import Http, build_app, problem, serving

SHOP = "https://shop.example"


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[Http]:
    with serving(build_app(folder, allow_origins=SHOP)) as client:
        yield client


def asking(origin: str = SHOP, method: str = "POST", fields: str = "content-type") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": fields,
    }


def test_allowed_origins_get_cors_headers(http: Http) -> None:
    response = http.request("OPTIONS", "/classify", headers=asking())
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == SHOP
    assert response.headers["access-control-allow-methods"] == "GET, POST"


def test_pages_may_read_the_id_of_a_request_and_when_to_try_again(http: Http) -> None:
    response = http.get("/model", headers={"Origin": SHOP})
    assert response.headers["access-control-expose-headers"] == "X-Request-ID, Retry-After"


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        (asking("https://other.example"), "origin"),
        (asking(method="PUT"), "method"),
        (asking(fields="authorization"), "headers"),
        (asking("https://other.example", "PUT"), "origin, method"),
    ],
)
def test_preflights_of_other_origins_get_a_problem(http: Http, headers: dict[str, str], why: str) -> None:
    response = http.request("OPTIONS", "/budget", headers=headers)
    document = problem(response, 400, "page-not-allowed")
    assert f"because of its {why}:" in document["detail"]
    assert "--allow-origins" in document["detail"]
    assert response.headers["access-control-max-age"] == "3600"
    assert ("access-control-allow-origin" in response.headers) is (headers["Origin"] == SHOP)
