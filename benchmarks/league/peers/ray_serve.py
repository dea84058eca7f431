"""Ray Serve: its HTTP proxy and one replica per core, each of which batches its requests (`serve.batch`)."""

import signal
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.league.peers.serving import Network, Setup, decode

setup = Setup.from_environment()


@serve.deployment(
    num_replicas=setup.n_workers,
    max_ongoing_requests=16 * setup.max_rows,
    ray_actor_options={"num_cpus": 0.5},  # for scheduling only: each replica computes on one thread
)
class Classifier:
    def __init__(self) -> None:
        self.network = Network(setup)

    @serve.batch(max_batch_size=setup.max_rows, batch_wait_timeout_s=setup.wait_ms / 1e3)
    async def run(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        return self.network.classify([decode(body, setup) for body in bodies])

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.run(await request.body())
        return answer


if __name__ == "__main__":
    ray.init(num_cpus=setup.n_workers, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": setup.port, "access_log": False})
    serve.run(Classifier.bind(), route_prefix="/classify")  # type: ignore[attr-defined]
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()
