"""LitServe: one API process and one worker process per core, batched by LitServe's own loop.

A FastAPI dependency passes the raw body to the worker, because LitServe's form parsing would cost more. `fast_queue`
(ZeroMQ) is on, as LitServe recommends for throughput.
"""

from typing import Annotated, Any

import litserve as ls
import numpy as np
from fastapi import Depends, Request
from numpy.typing import NDArray

from benchmarks.league.peers.serving import Network, Setup, decode

setup = Setup.from_environment()


async def raw_body(request: Request) -> bytes:
    return await request.body()


class Classifier(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.network = Network(setup)

    def decode_request(self, request: Annotated[bytes, Depends(raw_body)]) -> NDArray[np.uint8]:
        return decode(request, setup)

    def batch(self, inputs: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        return inputs  # `Network.classify` stacks them

    def predict(self, x: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        return self.network.classify(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    server = ls.LitServer(
        Classifier(max_batch_size=setup.max_rows, batch_timeout=setup.wait_ms / 1e3, api_path="/classify"),
        accelerator="cpu",
        devices=1,
        workers_per_device=setup.n_workers,
        fast_queue=True,
    )
    server.run(host="127.0.0.1", port=setup.port, generate_client_file=False, log_level="warning")
