"""The phases of the server: none of them is left for an earlier one."""

from pathlib import Path

import pytest

from service.api.lifecycle import Lifecycle, Phase
from tests.bundles import random_images
from tests.service.apps import PNG, build_app, png, problem, serving


def test_it_is_ready_once_it_has_started_and_until_it_drains() -> None:
    here = Lifecycle()
    assert (here.phase, here.takes_work) == (Phase.STARTING, False)
    here.become_ready()
    assert (here.is_ready, here.takes_work) == (True, True)
    here.drain()
    assert (here.is_ready, here.takes_work) == (False, True)  # what is in its sockets
    here.close()
    assert (here.phase, here.takes_work) == (Phase.DRAINING, False)


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.FAILED])
def test_a_server_that_ends_while_it_starts_never_takes_work(phase: Phase) -> None:
    here = Lifecycle()
    if phase is Phase.DRAINING:
        here.drain()
    else:
        here.fail("the engine did not start")
    assert not here.takes_work
    detail = here.detail
    here.become_ready()
    assert (here.phase, here.detail, here.takes_work) == (phase, detail, False)


def test_it_turns_unready_at_once_and_still_takes_what_was_in_its_sockets(folder: Path) -> None:
    app = build_app(folder)
    body = png(random_images(1, seed=73)[0])

    async def drain() -> None:
        app.lifecycle.drain()

    async def close() -> None:
        app.lifecycle.close()

    with serving(app) as http:
        http.run(drain())
        problem(http.get("/readyz"), 503, "not-ready")
        assert "exitserve_ready 0.0" in http.get("/metrics").text
        answer = http.post("/classify", content=body, headers=PNG)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        http.run(close())
        problem(http.post("/classify", content=body, headers=PNG), 503, "not-ready")
