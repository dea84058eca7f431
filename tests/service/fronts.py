"""Two proxies of one real engine, like those of two HTTP workers, but in this process."""

import asyncio
import socket
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import load_bundle
from service.assembly import build_engine
from service.budget.target import Keeper, Target
from service.engine.engine import Engine
from service.engine.rows import Told
from service.front.channel import Channel
from service.front.hub import Hub
from service.front.memory import Layout, SharedMemory
from service.front.proxy import RemoteEngine
from service.metrics import Metrics
from tests.bundles import CLASS_NAMES, random_images

N_SLOTS = 32
IMAGES = random_images(64, seed=77)


class Front:
    """A hub with a real engine, and two proxies on their own event loop."""

    def __init__(self, bundle_path: Path) -> None:
        bundle = load_bundle(bundle_path)
        n_exits = len(bundle.manifest.exits)
        self.n_exits = n_exits
        layout = Layout(n_workers=2, n_slots=N_SLOTS, height_px=32, width_px=32, n_exits=n_exits)
        self.memory = SharedMemory.create(layout)
        metrics = Metrics(bundle.manifest, [self.memory.tally(worker) for worker in range(2)])
        # Above the mean cost of random exits, so that images that request an exit reach it.
        budget_mflops = 0.8 * bundle.costs_mflops[-1]
        self.engine: Engine = build_engine(bundle, budget_mflops, n_lanes=2, max_in_flight_rows=48, observer=metrics)
        self.engine.start()
        metrics.watch(self.engine.stats, self.engine.budget_state, bundle)
        self.gone: list[tuple[int, int]] = []
        self.someone_has_gone = threading.Event()
        self.keeper = Keeper(self.engine, Target("fraction", budget_mflops))
        self.broken: Future[Exception] = Future()
        self.hub = Hub(
            self.engine,
            metrics,
            self.keeper,
            self.memory,
            on_serving=lambda worker: None,
            on_gone=self._on_gone,
            on_broken=self.broken.set_result,
        )
        self.hub.start()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.channels: list[Channel] = []
        self.proxies = [self.connect(worker) for worker in range(2)]

    def connect(self, worker: int) -> RemoteEngine:
        ours, theirs = socket.socketpair()
        channel = Channel(theirs)
        self.channels.append(channel)
        proxy = RemoteEngine(channel, self.memory, worker, CLASS_NAMES, lambda: None, lambda error: None)
        self.hub.attach(worker, ours)

        async def attach() -> None:
            proxy.attach(self.loop)

        self.run(attach())
        return proxy

    def _on_gone(self, worker: int, n_lost: int) -> None:
        self.gone.append((worker, n_lost))
        self.someone_has_gone.set()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def close(self) -> None:
        self.engine.drain(10)
        self.hub.stop()
        self.run(asyncio.sleep(0.01))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        for channel in self.channels:
            channel.close()


async def settled(proxy: RemoteEngine) -> None:
    """Wait until all slots are free, so that every answer or release has arrived."""
    while len(proxy._free) < N_SLOTS:
        await asyncio.sleep(0.001)


async def answer_of(proxy: RemoteEngine, image: NDArray[np.uint8]) -> Told:
    future: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
    proxy.submit_to(lambda told: future.set_result(told[0][1]), 1, image)
    return await future
