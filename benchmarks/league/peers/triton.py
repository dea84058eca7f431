"""Triton as packaged by `nvidia-pytriton`: its front end and dynamic batcher, and a Python function that runs batches.

The package has no ONNX Runtime backend, so the network runs in a Python function, as PyTriton intends. There is one
such function, which splits its batch over one thread per core: a second one must find the first within a second of
starting, and often failed to.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.league.peers.serving import Network, Setup, decode

setup = Setup.from_environment()
network = Network(setup)
threads = ThreadPoolExecutor(setup.n_workers)


def run(bodies: NDArray[np.object_]) -> list[dict[str, Any]]:
    return network.classify([decode(body, setup) for body in bodies])


@batch
def classify(image: NDArray[np.object_]) -> dict[str, NDArray[np.generic]]:
    """Classify image files, bytes [rows, 1]; returns classes and confidences, each [rows, 1]."""
    parts = np.array_split(image[:, 0], min(len(image), setup.n_workers))
    answers = [answer for part in threads.map(run, parts) for answer in part]
    return {
        "class_id": np.array([[answer["class_id"]] for answer in answers], np.int32),
        "confidence": np.array([[answer["confidence"]] for answer in answers], np.float32),
    }


if __name__ == "__main__":
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=setup.port,
        grpc_port=setup.port + 1,
        metrics_port=setup.port + 2,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classify",
            infer_func=classify,
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[
                Tensor(name="class_id", dtype=np.int32, shape=(1,)),
                Tensor(name="confidence", dtype=np.float32, shape=(1,)),
            ],
            config=ModelConfig(
                max_batch_size=setup.max_rows,
                batcher=DynamicBatcher(max_queue_delay_microseconds=round(1e3 * setup.wait_ms)),
            ),
        )
        triton.serve()
