"""ONNX Runtime on the CPU: the fastest engine measured there. Needs no torch. On GPUs, see `onnx_device`.

Each stage has one session of a single thread, which all lanes call; there is one lane per core. Sessions with thread
pools are slower than that, as the pools' threads spin against each other.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.bundle import Bundle
from models.manifest import ValueInfo
from models.onnx_weights import load_stage_session
from service.runners.agreement import InGraph, check_agreement
from service.runners.base import RunnerError, StageOutput, require_finite
from service.runners.blocks import Array, Block, Gathering, RowState
from service.runners.providers import CPU

ALIGNMENT_BYTES = 64


def default_lanes() -> int:
    """One per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxRunner:
    """Runs a bundle's stages with ONNX Runtime; see `base.Runner` for the contract.

    Args:
        bundle: with ONNX stages.
        max_rows: the largest batch.
        n_lanes: batches at once; by default one per core.

    Raises:
        StageLoadError: a stage cannot be opened, or is not what the manifest says.
        RunnerError: a number is out of range.
    """

    def __init__(self, bundle: Bundle, max_rows: int = 32, n_lanes: int | None = None) -> None:
        if max_rows < 1 or (n_lanes is not None and n_lanes < 1):
            raise RunnerError(f"max_rows ({max_rows}) and n_lanes ({n_lanes}) must be at least 1")
        self.stages, self._path = bundle.manifest.stages, bundle.path
        self.max_rows = max_rows
        self.n_lanes = n_lanes or default_lanes()
        self._sessions = _open_sessions(bundle)
        self._image = self.stages[0].inputs[0]
        self._image_shape, self._image_dtype = tuple(self._image.shape), np.dtype(self._image.dtype)
        # What a row carries on from stage k: all values made so far that a later stage reads.
        self._needed = [
            {value.name for stage in self.stages[k + 1 :] for value in stage.inputs} for k in range(len(self.stages))
        ]
        self._kept = [
            tuple(v.name for v in stage.outputs if v.name in self._needed[k]) for k, stage in enumerate(self.stages)
        ]
        self._lane = threading.local()  # each lane gathers into a buffer of its own

    @property
    def n_stages(self) -> int:
        return len(self.stages)

    def first_state(self, image: NDArray[np.uint8]) -> RowState:
        if image.shape != self._image_shape or image.dtype != self._image_dtype:
            wanted = f"{self._image_dtype} {self._image_shape}"
            raise ValueError(f"the image is {image.dtype} {image.shape}, but the network takes {wanted}")
        return RowState(Block({self._image.name: image[None]}, 1), 0)

    def run(self, stage: int, rows: Sequence[RowState]) -> StageOutput:
        return self.prepare(stage, rows)()

    def prepare(self, stage: int, rows: Sequence[RowState]) -> Callable[[], StageOutput]:
        started = time.perf_counter()
        gathering = Gathering(rows)
        n_rows, buffers = len(rows), self._buffers(stage)
        feed: dict[str, Array] = {}
        for value in self.stages[stage].inputs:
            carried = value.name in self._needed[stage]  # a later stage reads it too: it must outlive the lane's buffer
            feed[value.name] = gathering.take(value.name, None if carried else buffers[value.name][:n_rows])
        prepare_s = time.perf_counter() - started

        def run() -> StageOutput:
            started = time.perf_counter()
            try:
                outputs = self._sessions[stage].run(None, feed)
            except Exception as error:  # ONNX Runtime raises one type per status, with no common base but Exception
                raise RunnerError(f"stage {stage + 1} failed on a batch of {n_rows}: {error}") from error
            names = [value.name for value in self.stages[stage].outputs]
            by_name = dict(zip(names, outputs, strict=True))
            values = {name: by_name[name] for name in self._kept[stage]}
            for name in self._needed[stage].difference(values).intersection(rows[0].block.values):
                values[name] = feed[name] if name in feed else gathering.take(name)
            seconds = prepare_s + time.perf_counter() - started
            return StageOutput(outputs[0], Block(values, n_rows), seconds, prepare_s if gathering.copies else 0.0)

        return run

    def warm_up(self, limit_s: float = 1.0) -> list[dict[int, float]]:
        """Run every stage with 1 row, then with four times as many, up to `max_rows` or until `limit_s` would be over.

        Raises:
            RunnerError: a stage cannot run, or its output differs from the manifest.
        """
        times: list[dict[int, float]] = [{} for _ in self.stages]
        n_rows, spent_s = 1, 0.0
        while True:
            state = [self.first_state(np.zeros(self._image.shape, self._image.dtype)) for _ in range(n_rows)]
            rows: Sequence[RowState] = state
            for stage in range(self.n_stages):
                runs = [self.run(stage, rows) for _ in range(2)]
                self._check(stage, n_rows, runs[-1])
                require_finite(stage, runs[-1].logits)
                times[stage][n_rows] = min(run.seconds for run in runs)
                spent_s += sum(run.seconds for run in runs)
                rows = runs[-1].states
            # The next size takes about four times as long.
            if n_rows == self.max_rows or (spent_s * 4 > limit_s and n_rows > 1):
                return times
            n_rows = min(self.max_rows, n_rows * 4)

    def _check(self, stage: int, n_rows: int, output: StageOutput) -> None:
        """Compare the shapes of outputs with the manifest: a graph may leave sizes open, so only a run shows them.

        Raises:
            RunnerError: they differ.
        """
        outputs = self.stages[stage].outputs
        given = {outputs[0].name: output.logits, **output.block.values}
        for value in outputs:
            wanted = (n_rows, *value.shape)
            if value.name in given and given[value.name].shape != wanted:
                raise RunnerError(
                    f"{self._path / self.stages[stage].file}: for {n_rows} rows the graph gives {value.name!r} as "
                    f"{given[value.name].shape} where the manifest says {wanted}; export the bundle again"
                )

    def _buffers(self, stage: int) -> Mapping[str, Array]:
        """The lane's buffers [max_rows, ...] for the inputs of a stage; all stages of a lane share their memory."""
        lane = self._lane
        if not hasattr(lane, "buffers"):
            lane.arena = np.empty(max(_input_bytes(s.inputs, self.max_rows) for s in self.stages), np.uint8)
            lane.buffers = [_carve(lane.arena, s.inputs, self.max_rows) for s in self.stages]
        buffers: Mapping[str, Array] = lane.buffers[stage]
        return buffers


def session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # batches come in every size: a memory plan for each costs more than it saves
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _open_sessions(bundle: Bundle) -> list[ort.InferenceSession]:
    sessions = []
    for stage in bundle.manifest.stages:
        session = load_stage_session(bundle.path, stage.file, [CPU], session_options())
        inputs, outputs = (
            [InGraph(arg.name, arg.type.removeprefix("tensor(").removesuffix(")"), arg.shape or None) for arg in args]
            for args in (session.get_inputs(), session.get_outputs())
        )
        check_agreement(bundle.path / stage.file, stage, inputs, outputs)
        sessions.append(session)
    return sessions


def _bytes(value: ValueInfo, n_rows: int) -> int:
    exact = prod(value.shape) * np.dtype(value.dtype).itemsize * n_rows
    return -(-exact // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _input_bytes(values: Sequence[ValueInfo], n_rows: int) -> int:
    return sum(_bytes(value, n_rows) for value in values)


def _carve(arena: NDArray[np.uint8], values: Sequence[ValueInfo], n_rows: int) -> dict[str, NDArray[Any]]:
    """Place batches [n_rows, ...] of several values one after another in one buffer."""
    batches: dict[str, NDArray[Any]] = {}
    start = 0
    for value in values:
        batches[value.name] = np.ndarray((n_rows, *value.shape), np.dtype(value.dtype), arena.data, start)
        start += _bytes(value, n_rows)
    return batches
