"""`PUT /budget` requires the token, or without one a client on this machine."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from service.api.authority import require_authority
from service.api.problems import Problem
from tests.service.apps import build_app, problem, serving

TOKEN = "correct-horse-battery"


@pytest.mark.parametrize(
    ("client", "url", "headers", "allowed"),
    [
        ("127.0.0.1", "http://localhost:8000", {}, True),
        ("127.8.9.1", "http://127.0.0.1:8000", {}, True),
        ("::1", "http://[::1]:8000", {}, True),
        ("::ffff:127.0.0.1", "http://localhost", {}, True),
        ("192.168.0.7", "http://192.168.0.2:8000", {}, False),
        ("192.168.0.7", "http://localhost:8000", {}, False),
        ("::ffff:192.168.0.7", "http://localhost", {}, False),
        ("not an address", "http://localhost:8000", {}, False),
        ("127.0.0.1", "http://evil.example:8000", {}, False),
        ("127.0.0.1", "http://evil.example:x", {}, False),
        ("127.0.0.1", "http://[evil.example", {}, False),
        ("127.0.0.1", "http://", {}, False),
        ("127.0.0.1", "http://localhost:8000", {"X-Forwarded-For": "127.0.0.1"}, False),
        ("127.0.0.1", "http://localhost:8000", {"Forwarded": "for=10.0.0.1"}, False),
        ("127.0.0.1", "http://localhost:8000", {"X-Real-IP": "127.0.0.1"}, False),
        ("127.0.0.1", "http://localhost:8000", {"Via": "1.1 cache"}, False),
    ],
)
def test_without_a_token_only_local_clients_are_allowed(
    client: str, url: str, headers: dict[str, str], allowed: bool
) -> None:
    request = asked_by(client, url, headers)
    if allowed:
        require_authority(request, None)
        return
    with pytest.raises(Problem, match="EXITSERVE_ADMIN_TOKEN") as caught:
        require_authority(request, None)
    assert caught.value.status == 403


def asked_by(client: str, url: str, headers: dict[str, str]) -> Request:
    sent = {"Host": url.removeprefix("http://"), **headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in sent.items()]
    scope = {"type": "http", "scheme": "http", "path": "/budget", "headers": raw, "server": ("127.0.0.1", 8000)}
    return Request({**scope, "client": (client, 50_000)})


def test_a_remote_client_without_a_token_is_refused(folder: Path) -> None:
    with serving(build_app(folder), client=("10.1.2.3", 50_000)) as http:
        problem(http.put("/budget", json={"fraction": 0.5}), 403, "not-local")
        assert http.get("/budget").json()["fraction"] == pytest.approx(0.6, rel=1e-5)


def test_with_a_token_its_holders_are_allowed_from_anywhere(folder: Path) -> None:
    with serving(build_app(folder, admin_token=TOKEN), client=("10.1.2.3", 50_000)) as http:

        def put(**headers: str) -> Any:
            return http.put("/budget", json={"fraction": 0.5}, headers=headers)

        for headers in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": f"Bearer {TOKEN[:-1]}"},
            {"Authorization": "Bearer "},
            {"Authorization": TOKEN},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": "Bearer gr\u00fc\u00dfe-gr\u00fc\u00dfe".encode()},
        ):
            response = put(**headers)  # type: ignore[arg-type]
            document = problem(response, 401, "token-required")
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert TOKEN not in str(document)
        assert put(Authorization=f"Bearer {TOKEN}").status_code == 200
        assert put(Authorization=f"bearer {TOKEN}").status_code == 200
        assert http.get("/budget").status_code == 200
