"""Shared by all peers: the setup, decoding, and the whole network on ONNX Runtime.

Pillow decodes, and pixels stay uint8: the graph normalises them, so no peer spends time on it in numpy.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Setup:
    """The settings of the comparison, the same for every peer."""

    bundle: str  # folder
    graph: str  # file: the whole network, uint8 images [rows, H, W, 3] -> logits [rows, classes]
    port: int
    height_px: int
    width_px: int
    n_workers: int  # one per core, each with one thread
    max_rows: int  # the largest batch
    wait_ms: float  # longest wait for a batch to fill
    budget_fraction: float  # for peers with early exits

    @classmethod
    def from_environment(cls) -> "Setup":
        return cls(**json.loads(os.environ["LEAGUE_SETUP"]))


def decode(body: bytes, setup: Setup) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [H, W, 3]; ValueError if it is not of the network's size."""
    pixels = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
    if pixels.shape != (setup.height_px, setup.width_px, 3):
        raise ValueError(f"an image of {pixels.shape}")
    return pixels


def session_options() -> ort.SessionOptions:
    """One thread without spinning: one such worker per core was the fastest way to use two cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # batch sizes vary
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class Network:
    """The whole network, warmed up; `classify` is thread-safe."""

    def __init__(self, setup: Setup) -> None:
        self._session = ort.InferenceSession(setup.graph, session_options(), providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        for n_rows in (1, setup.max_rows):
            self.classify([np.zeros((setup.height_px, setup.width_px, 3), np.uint8)] * n_rows)

    def classify(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """One answer per image."""
        (logits,) = self._session.run(None, {self._input: np.stack(images)})
        return answers(logits)


def answers(logits: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Top class and its softmax for logits [rows, classes], in JSON types."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidences = (shifted.max(axis=1) / shifted.sum(axis=1)).tolist()
    classes = logits.argmax(axis=1).tolist()
    return [
        {"class_id": class_id, "confidence": confidence}
        for class_id, confidence in zip(classes, confidences, strict=True)
    ]
