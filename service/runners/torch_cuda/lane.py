"""One lane: a stream, its buffers, and a program for every stage and bucket. One batch at a time.

A batch of up to `bucket` rows is filled up to it with rows of `SCRATCH`. Its program reads the rows' slots from a
buffer that stays where it is, gathers, runs the stage, writes to the slots, and leaves what is told of the rows in
another.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.staging import Stage
from service.runners.base import Array, Heads
from service.runners.slots import SCRATCH
from service.runners.slotted import IMAGES
from service.runners.torch_cuda.device import Device, Program
from service.runners.torch_cuda.memory import Values
from service.runners.torch_cuda.resize import cut, resize
from service.runners.torch_cuda.scoring import N_NUMBERS, judge

StageCall = Callable[..., tuple[Tensor, ...]]
"""A stage, or what computes the same."""


class Lane:
    """See the module.

    Args:
        device: where it runs; a stream is opened there.
        stages: lowered, on the device; shared by all lanes, as are `values`.
        image_shape: (height, width, 3).
        n_classes: of the network.
        score: a key of `scoring.SCORES`; None leaves scores, classes and confidences to the caller.
        max_rows: the largest bucket.
        canvas_px: pictures of up to so many pixels a side are resized here; 0: none are.
    """

    def __init__(
        self,
        device: Device,
        stages: Sequence[Stage],
        values: Values,
        image_shape: Sequence[int],
        n_classes: int,
        score: str | None,
        max_rows: int,
        canvas_px: int = 0,
    ) -> None:
        self.stream = device.open_stream()
        self.programs: dict[tuple[int, int], Program] = {}  # by stage and bucket
        self._stages, self._values = stages, values
        self._n_classes, self._score = n_classes, score
        self._row_bytes = 8 * N_NUMBERS + 4 * n_classes
        host = partial(torch.zeros, pin_memory=device.pins)
        there = partial(torch.zeros, device=device.kind)
        self._slots_host, self._slots = (make(max_rows, dtype=torch.int64) for make in (host, there))
        self._images_host, self._images = (make((max_rows, *image_shape), dtype=torch.uint8) for make in (host, there))
        self._image_shape, self._canvas_px = tuple(image_shape), canvas_px
        self._resizers: dict[int, Program] = {}  # by bucket
        canvas = (max_rows if canvas_px else 0, canvas_px, canvas_px, 3)
        self._canvases_host, self._canvases = (make(canvas, dtype=torch.uint8) for make in (host, there))
        self._cuts_host, self._cuts = (make((max_rows, 2, 3), dtype=torch.float64) for make in (host, there))
        self._told_host, self._told = (make(max_rows * self._row_bytes, dtype=torch.uint8) for make in (host, there))

    @torch.inference_mode()
    def prepare(self, stage: int, bucket: int, call: StageCall | None = None) -> None:
        """Make the program of a stage for batches of up to `bucket` rows; `call` takes the stage's place in it."""
        self._slots_host.fill_(SCRATCH)
        with self.stream.use():
            self._slots.copy_(self._slots_host)
        self.programs[stage, bucket] = self.stream.prepare(
            partial(self._program, stage, bucket, call or self._stages[stage])
        )

        if stage == 0 and self._canvas_px:
            self._cuts_host.copy_(torch.tensor(cut(self._image_shape[0], self._image_shape[1], self._image_shape)))
            with self.stream.use():
                self._cuts.copy_(self._cuts_host)
            self._resizers[bucket] = self.stream.prepare(partial(self._resize, bucket))

    @torch.inference_mode()
    def run(
        self, stage: int, bucket: int, slots: Sequence[int], images: Sequence[Array] = ()
    ) -> tuple[NDArray[np.float32], Heads | None]:
        """See `slotted.Lane`."""
        n_rows = len(slots)
        self._slots_host.numpy()[:bucket] = [*slots, *[SCRATCH] * (bucket - n_rows)]
        own_size = all(image.shape == self._image_shape for image in images)
        if images and own_size:
            np.stack(images, out=self._images_host.numpy()[:n_rows])
        elif images:
            self._lay_out(images)
        with self.stream.use():
            self._slots[:bucket].copy_(self._slots_host[:bucket], non_blocking=True)
            if images and own_size:
                self._images[:n_rows].copy_(self._images_host[:n_rows], non_blocking=True)
            elif images:
                self._canvases[:n_rows].copy_(self._canvases_host[:n_rows], non_blocking=True)
                self._cuts[:n_rows].copy_(self._cuts_host[:n_rows], non_blocking=True)
                self._resizers[bucket]()
            self.programs[stage, bucket]()
            n_bytes = bucket * self._row_bytes
            self._told_host[:n_bytes].copy_(self._told[:n_bytes], non_blocking=True)
            self.stream.wait()
        numbers, logits = (part[:n_rows].numpy().copy() for part in self._parts(self._told_host, bucket))
        if self._score is None:
            return logits, None
        return logits, Heads(numbers[:, 0].astype(np.int64), numbers[:, 1], numbers[:, 2])

    @torch.inference_mode()
    def seconds(self, stage: int, bucket: int, repeats: int) -> float:
        """What a program takes, `repeats` of them being put on the stream one after the other."""
        program = self.programs[stage, bucket]
        with self.stream.use():
            program()
            self.stream.wait()
            started = time.perf_counter()
            for _ in range(repeats):
                program()
            self.stream.wait()
        return (time.perf_counter() - started) / repeats

    def _program(self, stage_index: int, bucket: int, call: StageCall) -> None:
        stage, slots = self._stages[stage_index], self._slots[:bucket]
        carried = [name for name in stage.inputs if name != IMAGES]
        inputs = dict(zip(carried, self._values.gather(carried, slots), strict=True))
        inputs[IMAGES] = self._images[:bucket]
        outputs = call(*(inputs[name] for name in stage.inputs))
        made = zip(stage.outputs, outputs, strict=True)
        self._values.scatter({name: value for name, value in made if name in self._values}, slots)
        told, logits = self._parts(self._told, bucket)
        if self._score is not None:
            told.copy_(judge(outputs[0], self._score))
        logits.copy_(outputs[0])

    def _lay_out(self, images: Sequence[Array]) -> None:
        """Pictures of any size into the corners of their canvases."""
        canvases, cuts = self._canvases_host.numpy(), self._cuts_host.numpy()
        for i, image in enumerate(images):
            height, width = image.shape[:2]
            canvases[i, :height, :width] = image
            cuts[i] = cut(height, width, self._image_shape)

    def _resize(self, bucket: int) -> None:
        dtype = torch.float32 if self._canvases.device.type == "cpu" else torch.float16
        self._images[:bucket].copy_(resize(self._canvases[:bucket], self._cuts[:bucket], self._image_shape, dtype))

    def _parts(self, told: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
        """What is told of `bucket` rows [rows, N_NUMBERS] and their logits [rows, classes] in one run of bytes."""
        middle = bucket * 8 * N_NUMBERS
        end = middle + bucket * 4 * self._n_classes
        numbers = told[:middle].view(torch.float64).view(bucket, N_NUMBERS)
        return numbers, told[middle:end].view(torch.float32).view(bucket, self._n_classes)
