"""FastAPI with carefully written micro-batching: a queue, and one thread per core that runs batches from it.

A free thread takes all queued images, at most `max_rows`, without waiting for more: under load the queue fills while
the threads work.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray

from benchmarks.league.peers.serving import Network, Setup, decode

SMALL_PIXELS = 128 * 128  # up to this size, handing over to a thread costs more than decoding
Waiting = tuple[NDArray[np.uint8], "asyncio.Future[dict[str, Any]]"]

setup = Setup.from_environment()
network = Network(setup)
threads = ThreadPoolExecutor(setup.n_workers)
decoders = ThreadPoolExecutor(setup.n_workers)
queue: "asyncio.Queue[Waiting]" = asyncio.Queue()


async def work() -> None:
    """Run batches one after another; one such task runs per thread."""
    loop = asyncio.get_running_loop()
    while True:
        batch = [await queue.get()]
        while len(batch) < setup.max_rows and not queue.empty():
            batch.append(queue.get_nowait())
        answers = await loop.run_in_executor(threads, network.classify, [pixels for pixels, _ in batch])
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)


@asynccontextmanager
async def lifespan(app: FastAPI) -> Any:
    workers = [asyncio.create_task(work()) for _ in range(setup.n_workers)]
    yield
    for worker in workers:
        worker.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
async def classify(request: Request) -> Response:
    loop = asyncio.get_running_loop()
    body = await request.body()
    if setup.height_px * setup.width_px <= SMALL_PIXELS:
        pixels = decode(body, setup)
    else:
        pixels = await loop.run_in_executor(decoders, decode, body, setup)
    future: asyncio.Future[dict[str, Any]] = loop.create_future()
    queue.put_nowait((pixels, future))
    return Response(orjson.dumps(await future), media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, port=setup.port, access_log=False, log_level="warning")
