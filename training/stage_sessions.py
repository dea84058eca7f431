"""Runs all stages of a bundle on all rows, without early exit: for measuring, not for serving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tqdm import tqdm

from models.manifest import StageInfo
from models.onnx_weights import load_stage_session

BATCH_ROWS = 50
Values = dict[str, NDArray[Any]]


class StageSessions:
    """ONNX Runtime sessions of a bundle's stages, on the CPU.

    Args:
        folder: the bundle's.
        stages: of the manifest.

    Raises:
        StageLoadError: a stage cannot be opened.
    """

    def __init__(self, folder: Path, stages: Sequence[StageInfo]) -> None:
        self.stages = stages
        self._sessions = [load_stage_session(folder, stage.file, session_options=_options()) for stage in stages]

    def start(self, images: NDArray[np.uint8]) -> list[Values]:
        """The states of images [images, height, width, 3] before stage 1, one per batch."""
        name = self.stages[0].inputs[0].name
        return [{name: images[i : i + BATCH_ROWS]} for i in range(0, len(images), BATCH_ROWS)]

    def advance(self, stage: int, state: Values) -> NDArray[np.float32]:
        """Run one stage (from 0) on a batch: return its logits, and update `state` to what later stages read."""
        names = [value.name for value in self.stages[stage].outputs]
        outputs = self._sessions[stage].run(
            names, {value.name: state[value.name] for value in self.stages[stage].inputs}
        )
        state.update(zip(names, outputs, strict=True))
        later = {value.name for after in self.stages[stage + 1 :] for value in after.inputs}
        for name in set(state) - later:
            del state[name]
        logits: NDArray[np.float32] = outputs[0]
        return logits

    def run(self, images: NDArray[np.uint8], description: str) -> list[NDArray[np.float32]]:
        """The logits [exits][images, classes] of images [images, height, width, 3], with a progress bar."""
        batches = tqdm(self.start(images), unit="image", unit_scale=BATCH_ROWS, desc=description, disable=None)
        collected = [[self.advance(stage, state) for stage in range(len(self.stages))] for state in batches]
        return [np.concatenate(parts) for parts in zip(*collected, strict=True)]


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other sessions need the cores
    return options
