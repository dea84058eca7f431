"""The real application with a real engine, in this process; requests do not pass through sockets."""

import asyncio
import io
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from models.bundle import load_bundle
from service.api import problems
from service.api.app import create_app
from service.api.gate import Gate
from service.assembly import build_engine
from service.budget.target import Keeper, Targets
from service.engine.engine import Engine
from service.metrics import Metrics
from service.runners.precision import at_precision
from service.settings import Settings
from tests.waiting import wait_until

T = TypeVar("T")

PNG = {"Content-Type": "image/png"}


def build_app(
    folder: Path,
    keep: Callable[[Engine], object] = lambda engine: None,
    on_started: Callable[[Exception | None], object] = lambda error: None,
    **settings: Any,
) -> Gate:
    """Build the application like `python -m service`, on two CPU lanes; `keep` is called with its engine."""
    chosen = Settings(**{"bundle": folder, "lanes": 2, "device": "cpu", "budget_fraction": 0.6, **settings})
    bundle = at_precision(load_bundle(folder), chosen.precision, chosen.runner, chosen.device)
    targets = Targets(bundle.frontier(), bundle.costs_mflops)
    target = targets.resolve("fraction", chosen.budget_fraction or 1.0)
    metrics = Metrics(bundle.manifest)
    engine = build_engine(
        bundle,
        target.average_mflops,
        runner_name=chosen.runner,
        device=chosen.device,
        resize=chosen.resize,
        n_lanes=chosen.lanes,
        max_rows=chosen.max_batch_rows,
        burst_images=chosen.burst_images,
        max_in_flight_rows=chosen.max_in_flight,
        max_queue_s=chosen.max_queue_s,
        latency_s=chosen.latency_s,
        observer=metrics,
    )
    keep(engine)
    metrics.watch(engine.stats, engine.budget_state, bundle)
    keeper = Keeper(engine, target)
    return create_app(bundle, engine, metrics, targets, keeper, chosen, chosen.read_admin_token(), on_started)


class Http:
    """Runs an application on an event loop in its own thread, and is its client."""

    def __init__(self, app: Gate, client: tuple[str, int], url: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="event loop", daemon=True)
        self._thread.start()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
        self._client = httpx.AsyncClient(transport=transport, base_url=url)
        fastapi = app.app
        assert isinstance(fastapi, FastAPI)
        self._lifespan = fastapi.router.lifespan_context(fastapi)
        self.run(self._lifespan.__aenter__())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.run(self._client.request(method, path, **options))

    def delete(self, path: str, **options: Any) -> httpx.Response:
        return self.request("DELETE", path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def put(self, path: str, **options: Any) -> httpx.Response:
        return self.request("PUT", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def post_all(self, path: str, bodies: Sequence[bytes], n_clients: int, **options: Any) -> list[httpx.Response]:
        """Post bodies from `n_clients` at once; returns their responses in the order of the bodies."""

        async def all_of_them() -> list[httpx.Response]:
            places = asyncio.Semaphore(n_clients)

            async def one(body: bytes) -> httpx.Response:
                async with places:
                    return await self._client.post(path, content=body, **options)

            return await asyncio.gather(*(one(body) for body in bodies))

        return self.run(all_of_them())

    def close(self) -> None:
        self.run(self._lifespan.__aexit__(None, None, None))
        self.run(self._client.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextmanager
def serving(
    app: Gate, client: tuple[str, int] = ("127.0.0.1", 50_000), url: str = "http://127.0.0.1:8000", ready: bool = True
) -> Iterator[Http]:
    """Run an application from startup to shutdown; yields a client with the address `client`."""
    http = Http(app, client, url)
    try:
        if ready:
            wait_until("it is ready", lambda: http.get("/readyz").status_code == 200)
        yield http
    finally:
        http.close()


def png(pixels: NDArray[np.uint8]) -> bytes:
    return encoded(pixels, "PNG")


def encoded(pixels: NDArray[np.uint8], file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """Check that a response is a complete problem document of that kind, and return it."""
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
