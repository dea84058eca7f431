"""BentoML: an API service that decodes images, and behind it a batching service with one worker per core.

Two services are needed because a batchable call takes a list, whereas clients send one image.
"""

from pathlib import Path
from typing import Annotated, Any

import bentoml
import numpy as np
from bentoml.validators import ContentType
from numpy.typing import NDArray

from benchmarks.league.peers.serving import Network, Setup, decode

setup = Setup.from_environment()


@bentoml.service(workers=setup.n_workers, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Runner:
    def __init__(self) -> None:
        self.network = Network(setup)

    @bentoml.api(batchable=True, batch_dim=(0, 0), max_batch_size=setup.max_rows, max_latency_ms=1000)
    def run(self, images: NDArray[np.uint8]) -> list[dict[str, Any]]:
        return self.network.classify(list(images))


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Classifier:
    runner = bentoml.depends(Runner)

    @bentoml.api(route="/classify")
    async def classify(self, image: Annotated[Path, ContentType("image/*")], /) -> dict[str, Any]:
        pixels = decode(image.read_bytes(), setup)
        (answer,) = await self.runner.to_async.run(pixels[None])
        return dict(answer)
