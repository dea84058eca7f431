"""mosec with one stage: one worker process per core behind mosec's own front end, which batches."""

from typing import Any

import numpy as np
from mosec import Server, Worker
from numpy.typing import NDArray

from benchmarks.league.peers.serving import Network, Setup, decode


class Classifier(Worker):
    def __init__(self) -> None:
        self.served = Setup.from_environment()
        self.network = Network(self.served)

    def deserialize(self, data: bytes) -> NDArray[np.uint8]:
        return decode(data, self.served)

    def forward(self, data: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        return self.network.classify(data)


if __name__ == "__main__":
    setup = Setup.from_environment()
    server = Server()
    server.append_worker(
        Classifier, num=setup.n_workers, max_batch_size=setup.max_rows, max_wait_time=max(1, round(setup.wait_ms))
    )
    server.run()
