"""The runner: lanes that take turns with a device, and slots in which rows stay from stage to stage."""

import logging
import time
from collections.abc import Mapping, Sequence
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.bundle import Bundle
from models.staging import Stage
from service.runners.base import Block, FatalRunnerError, Heads, RowState, RunnerError, StageOutput
from service.runners.torch_cuda.device import Cuda, Device, Host
from service.runners.torch_cuda.lane import IMAGES, Lane, buckets_for
from service.runners.torch_cuda.memory import Slot, Slots, Values
from service.runners.torch_cuda.network import cut, load_network, lower
from service.runners.torch_cuda.scoring import SCORES

logger = logging.getLogger(__name__)

N_LANES = 2  # while what one lane has to tell travels, the other one's batch runs
REPEATS = 3


class TorchCudaRunner:
    """Runs a network's stages as CUDA graphs; see `base.Runner` for the contract.

    A row's logits depend on the rows beside it by the bucket alone that its batch falls in: libraries choose other
    algorithms for other sizes, which differ in the last bits.

    Args:
        network: with exits, in evaluation mode; see `models.staging.split`.
        image_shape: (height, width, 3) of the uint8 images.
        mean, std: of the network's normalisation.
        score: a key of `scoring.SCORES` that is worked out on the device; None leaves that to the caller.
        max_rows: the largest batch; less where the device's memory ends before, see `warm_up`.
        max_in_flight_rows: images in work at once; each has a slot on the device.
        device: by default the first GPU.
        dtype: of maps and convolutions.
        n_lanes: batches at once.

    Raises:
        RunnerError: the device has no room for the slots, or a number is out of range.
        StagingError: the network cannot be cut into stages.
    """

    def __init__(
        self,
        network: nn.Module,
        image_shape: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        score: str | None,
        max_rows: int = 64,
        max_in_flight_rows: int = 1024,
        device: Device | None = None,
        dtype: torch.dtype = torch.float16,
        n_lanes: int = N_LANES,
    ) -> None:
        if max_rows < 1 or n_lanes < 1:
            raise RunnerError(f"max_rows ({max_rows}) and n_lanes ({n_lanes}) must be at least 1")
        self.device = device or Cuda()
        self.n_lanes = n_lanes
        self.buckets = buckets_for(max_rows)
        self.score = score
        self.image_shape = tuple(image_shape)
        try:
            with torch.inference_mode():
                self.stages = lower(cut(network, image_shape, mean, std), self.device.kind, dtype)
                blank = torch.zeros((2, *image_shape), dtype=torch.uint8, device=self.device.kind)
                examples, self._n_classes = _run_once(self.stages, blank)
                # Beside the images in work, those of the batches that lanes run for nobody, or have run last.
                self.slots = Slots(max_in_flight_rows + 2 * n_lanes * max_rows)
                self.values = Values(examples, self.slots.n_slots)
            self._open_lanes()
        except torch.OutOfMemoryError as error:
            raise RunnerError(
                f"the device has no room for the state of {max_in_flight_rows} images in work: lower --max-in-flight "
                f"or --max-batch-rows ({error})"
            ) from error

    @property
    def n_stages(self) -> int:
        return len(self.stages)

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def first_state(self, image: NDArray[np.uint8]) -> RowState:
        if image.shape != self.image_shape or image.dtype != np.uint8:
            raise ValueError(f"an image {image.dtype} {image.shape} where the network takes uint8 {self.image_shape}")
        return RowState(Block({IMAGES: image[None]}, 1), 0)

    def run(self, stage: int, rows: Sequence[RowState]) -> StageOutput:
        started = time.perf_counter()
        slots = self.slots.take(len(rows)) if stage == 0 else [_slot_of(row) for row in rows]
        images = [row.block.values[IMAGES][row.index] for row in rows] if stage == 0 else []
        bucket = next(size for size in self.buckets if size >= len(rows))
        lane = self._idle.get()
        try:
            with torch.inference_mode():
                told, logits = lane.run(stage, bucket, [slot.index for slot in slots], images)
        except Exception as error:  # torch raises RuntimeErrors of many kinds
            what = f"stage {stage + 1} failed on a batch of {len(rows)}: {error}"
            raise (FatalRunnerError if self.device.is_lost() else RunnerError)(what) from error
        finally:
            self._idle.put(lane)
        heads = Heads(told[:, 0].astype(np.int64), told[:, 1], told[:, 2]) if self.score else None
        goes_on = stage + 1 < self.n_stages
        block = Block({}, len(rows), slots if goes_on else None)
        return StageOutput(logits, block, time.perf_counter() - started, heads=heads)

    def warm_up(self, limit_s: float = 1.0) -> Sequence[Mapping[int, float]]:
        """Prepare every stage at every bucket, the first time; then run every stage at all buckets for `limit_s`.

        Where the memory of the device ends, `max_rows` is halved, with a warning.

        Raises:
            RunnerError: not even single images can be run.
        """
        if not self.lanes[0].programs:
            self._prepare()
        times: list[dict[int, float]] = [{} for _ in range(self.n_stages)]
        spent_s = 0.0
        for bucket in self.buckets:
            rows: Sequence[RowState] = [self.first_state(np.zeros(self.image_shape, np.uint8)) for _ in range(bucket)]
            for stage in range(self.n_stages):
                seconds = []
                for _ in range(REPEATS):
                    output = self.run(stage, rows)
                    seconds.append(output.seconds)
                times[stage][bucket] = min(seconds)
                spent_s += sum(seconds)
                rows = output.states
            if spent_s > limit_s:
                break
        return times

    def _prepare(self) -> None:
        while (why := self._out_of_memory_at()) is not None:
            # Here, not where the error was caught: it held on to all that its call had allocated.
            self.lanes.clear()
            self.device.release_memory()
            too_many = self.buckets.pop()
            if not self.buckets:
                raise RunnerError(f"the device has no memory for single images: {why}")
            logger.warning("no memory for %d images at once, at most %d run together: %s", too_many, self.max_rows, why)
            self._open_lanes()

    def _out_of_memory_at(self) -> str | None:
        """Prepare all programs; returns None, or what was said where the memory ended."""
        try:
            with torch.inference_mode():
                for lane in self.lanes:
                    for bucket in reversed(self.buckets):  # so that smaller ones find their memory in the pool
                        for stage in range(self.n_stages):
                            lane.prepare(stage, bucket)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                return str(error)
            what = f"the stages cannot be prepared: {error}"
            raise (FatalRunnerError if self.device.is_lost() else RunnerError)(what) from error
        return None

    def _open_lanes(self) -> None:
        told = (self._n_classes, self.score or "logit_margin", self.max_rows)
        with torch.inference_mode():
            self.lanes = [
                Lane(self.device, self.stages, self.values, self.image_shape, *told) for _ in range(self.n_lanes)
            ]
        self._idle: SimpleQueue[Lane] = SimpleQueue()
        for lane in self.lanes:
            self._idle.put(lane)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Said by torch's allocator or CUDA, here or before a capture was broken off; or hidden by the capture itself.

    In a capture, torch may try to free memory before it says that there is none, which CUDA does not allow: what then
    comes out is that the capture is invalid (pytorch/pytorch, issue 159594).
    """
    words = ("out of memory", "previous error during capture")
    said = (error, error.__context__)
    return any(isinstance(one, torch.OutOfMemoryError) or any(word in str(one) for word in words) for one in said)


def open_torch_runner(
    bundle: Bundle,
    max_rows: int,
    max_in_flight_rows: int,
    n_lanes: int | None = None,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
) -> TorchCudaRunner:
    """Make the runner of a bundle.

    Args:
        device: by default the first GPU.
        dtype: by default half precision on a GPU, float32 on the host.

    Raises:
        RunnerError: there is no GPU, the bundle's network cannot be rebuilt, or the device has no room.
    """
    if device is None and not torch.cuda.is_available():
        raise RunnerError(
            f"the runner torch-cuda was asked for, but torch {torch.__version__} sees no GPU: choose the runner onnx "
            "or auto, or install a driver and a CUDA build of torch"
        )
    network, manifest = load_network(bundle), bundle.manifest
    if dtype is None:
        dtype = torch.float32 if isinstance(device, Host) else torch.float16
    return TorchCudaRunner(
        network,
        (manifest.input.height_px, manifest.input.width_px, 3),
        manifest.input.mean,
        manifest.input.std,
        manifest.score if manifest.score in SCORES else None,
        max_rows,
        max_in_flight_rows,
        device,
        dtype,
        n_lanes or N_LANES,
    )


def _slot_of(row: RowState) -> Slot:
    assert row.block.slots is not None  # it has run the first stage
    slot: Slot = row.block.slots[row.index]
    return slot


def _run_once(stages: Sequence[Stage], images: Tensor) -> tuple[dict[str, Tensor], int]:
    """Run all stages; returns what they make that a later one reads, by name, and the number of classes."""
    state = {IMAGES: images}
    for i, stage in enumerate(stages):
        if i and IMAGES in stage.inputs:
            raise RunnerError(f"stage {i + 1} reads the images, which only the first one can: choose the runner onnx")
        state.update(zip(stage.outputs, stage(*(state[name] for name in stage.inputs)), strict=True))
    read = {name for stage in stages for name in stage.inputs} - {IMAGES}
    return {name: state[name] for name in sorted(read)}, state[stages[0].outputs[0]].shape[1]
