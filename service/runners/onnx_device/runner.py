"""The runner: sessions of a bundle's stages on a device, and the stores that hold the state of rows between stages."""

import logging
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from models.bundle import Bundle
from models.onnx_weights import StageLoadError, load_stage_session
from service.runners.base import RunnerError, require_finite
from service.runners.limits import is_out_of_memory
from service.runners.onnx import session_options
from service.runners.onnx_device.graph import STORE_OPERATORS, with_slots
from service.runners.onnx_device.lane import OnnxLane
from service.runners.providers import (
    CPU,
    CUDA,
    TENSORRT,
    check_device,
    check_loaded,
    cuda_options,
    engine_cache,
    is_lost,
    load_libraries,
    tensorrt_options,
)
from service.runners.slotted import DEFAULT_LANES, SlotRunner

logger = logging.getLogger(__name__)

MAX_ELEMENTS = 2**31 - 1  # in a store: ONNX Runtime's kernels index with 32 bits


class OnnxDeviceRunner(SlotRunner[OnnxLane]):
    """Runs a bundle's stages with ONNX Runtime on a device; see `base.Runner` for the contract.

    Args:
        bundle: with ONNX stages, of which only the first reads images.
        device: "cuda", "tensorrt", or "cpu" to run the same on the CPU.
        max_rows, max_in_flight_rows, n_lanes: see `SlotRunner`.

    Attributes:
        cuda_graphs: whether stages are captured as CUDA graphs: with "cuda", unless ONNX Runtime refuses.

    Raises:
        StageLoadError: a stage cannot be opened, or is not what the manifest says.
        RunnerError: the device cannot be used or has too little memory, or a number is out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Literal["cpu", "cuda", "tensorrt"],
        max_rows: int = 64,
        max_in_flight_rows: int = 1024,
        n_lanes: int = DEFAULT_LANES,
    ) -> None:
        check_device(device)
        stages = bundle.manifest.stages
        image = stages[0].inputs[0]
        super().__init__(len(stages), image.shape, image.dtype, max_rows, max_in_flight_rows, n_lanes)
        self.stages, self.device, self.cuda_graphs = stages, device, device == "cuda"
        self._bundle, self._asked_rows = bundle, max_rows
        self._engines = engine_cache(bundle, max_rows) if device == "tensorrt" else Path()
        self._kind = "cpu" if device == "cpu" else "cuda"
        self.is_on_gpu = device != "cpu"
        read_later = {value.name for stage in stages[1:] for value in stage.inputs}
        if image.name in read_later:
            raise RunnerError("a later stage reads the images, which only the first one can: choose the device cpu")
        self._kept = {v.name: v for stage in stages for v in stage.outputs if v.name in read_later}
        if device != "cpu":
            load_libraries()
        n_slots = 1 + self.slots.n_slots
        if any(n_slots * prod(value.shape) > MAX_ELEMENTS for value in self._kept.values()):
            raise RunnerError(f"{max_in_flight_rows} images in flight are too many for a store: lower --max-in-flight")
        self._graphs = [with_slots(bundle.path / stage.file, stage, self._kept.keys(), n_slots) for stage in stages]
        self.stores: dict[str, Any] = {}
        self._open_lanes()

    def warm_up(self, limit_s: float = 1.0) -> Sequence[Mapping[int, float]]:
        """See `SlotRunner.warm_up`.

        Raises:
            RunnerError: also if logits are not finite.
        """
        times = super().warm_up(limit_s)
        rows = [self.first_state(np.zeros(self.image_shape, self.image_dtype))]
        for stage in range(self.n_stages):
            require_finite(stage, self.run(stage, rows).logits)
        return times

    def _open_lane(self) -> OnnxLane:
        sessions = self._open_sessions()
        if not self.stores:  # after the sessions: without one, ONNX Runtime cannot allocate on the device
            self.stores = self._open_stores()
        return OnnxLane(
            sessions, self.stages, self.stores, self._kind, pictures=self.pictures, own_thread=self.cuda_graphs
        )

    def _open_stores(self) -> dict[str, Any]:
        shapes = {name: (1 + self.slots.n_slots, *value.shape) for name, value in self._kept.items()}
        try:
            return {
                name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._kept[name].dtype), self._kind)
                for name, shape in shapes.items()
            }
        except Exception as error:  # ONNX Runtime raises one type per status, with no common base but Exception
            raise RunnerError(
                f"the device has no room for the state of {self.slots.n_slots} images: lower --max-in-flight or "
                f"--max-batch-rows ({error})"
            ) from error

    def _is_lost(self, error: Exception) -> bool:
        return is_lost(error)

    def _open_sessions(self) -> list[ort.InferenceSession]:
        try:
            return [self._open_session(k) for k in range(self.n_stages)]
        except StageLoadError as error:
            if not self.cuda_graphs or is_out_of_memory(error):
                raise
            logger.warning("stages are not captured as CUDA graphs: %s", error)
            self.cuda_graphs = False
            return [self._open_session(k) for k in range(self.n_stages)]

    def _open_session(self, k: int) -> ort.InferenceSession:
        stage = self.stages[k]
        providers: list[tuple[str, dict[str, str]]] = [(CPU, {})]
        if self.device != "cpu":
            providers.insert(0, (CUDA, cuda_options(self.cuda_graphs)))
        if self.device == "tensorrt":
            options = tensorrt_options(stage, self._asked_rows, self._engines, STORE_OPERATORS)
            providers.insert(0, (TENSORRT, options))
        session = load_stage_session(self._bundle.path, stage.file, providers, session_options(), self._graphs[k])
        check_loaded(session, providers[0][0])
        return session
