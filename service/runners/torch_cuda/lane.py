"""One lane: a stream, its buffers, and a program for every stage and bucket. It runs one batch at a time.

A batch is padded to the size of its bucket with rows of slot `SCRATCH`. Its program reads the rows' slots from a fixed
buffer, gathers their values, runs the stage, scatters its outputs to the slots, and writes heads (`base.Heads`) and
logits to another fixed buffer. A batch may be launched while the one before it runs, so there are two sets of buffers
on the host, used in turn.
"""

import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.staging import Stage
from service.runners.base import NO_LOGITS, Heads
from service.runners.slots import NOWHERE, SCRATCH, SlotState, places_of, stretches
from service.runners.slotted import IMAGES, Running
from service.runners.torch_cuda.device import Device, Mark, Program, Stream
from service.runners.torch_cuda.kernels import Kernels
from service.runners.torch_cuda.memory import Values
from service.runners.torch_cuda.resize import cut, resize
from service.runners.torch_cuda.scoring import N_NUMBERS

StageCall = Callable[..., tuple[Tensor, ...]]
"""A stage, or a function that computes the same."""
N_TURNS = 2
"""Batches of a lane on the stream at once, each with host buffers of its own."""


class Lane:
    """A `slotted.Lane`; see the module.

    Args:
        device: where it runs; a stream is opened there.
        stages: lowered, on the device; shared by all lanes, as are `values` and `kernels`.
        image_shape: (height, width, 3).
        n_classes: of the network.
        score: a key of `scoring.SCORES`; None leaves classes, confidences and scores to the caller.
        max_rows: the largest bucket.
        pictures: uint8 [places, *image_shape] on the host, see `SlotRunner`; pinned if `device.pins`.
        canvas_px: the largest side of images that are resized here; 0: none are.
    """

    def __init__(
        self,
        device: Device,
        stages: Sequence[Stage],
        values: Values,
        kernels: Kernels,
        image_shape: Sequence[int],
        n_classes: int,
        score: str | None,
        max_rows: int,
        pictures: Tensor,
        canvas_px: int = 0,
    ) -> None:
        self.stream = device.open_stream()
        self.programs: dict[tuple[int, int], Program] = {}  # by stage and bucket
        self._stages, self._values, self._kernels = stages, values, kernels
        self._n_classes, self._score = n_classes, score
        row_bytes = 8 * N_NUMBERS + 4 * n_classes
        self._image_shape, self._canvas_px = tuple(image_shape), canvas_px
        self._resizers: dict[int, Program] = {}  # by bucket
        self._buckets: dict[int, _Bucket] = {}
        self._turn = 0
        canvas = (max_rows if canvas_px else 0, canvas_px, canvas_px, 3)
        new_pair = partial(_Pair, device, self.stream)
        self._slots = new_pair((max_rows,), torch.int64)
        self._pictures = pictures
        self._images = torch.zeros((max_rows, *image_shape), dtype=torch.uint8, device=device.kind)
        self._send_pictures = self.stream.copier(self._images, pictures)
        self._canvases = new_pair(canvas, torch.uint8)
        self._cuts = new_pair((max_rows, 2, 3), torch.float64)
        self.results = new_pair((max_rows * row_bytes,), torch.uint8)
        self._marks = [self.stream.mark() for _ in range(N_TURNS)]  # by turn

    @torch.inference_mode()
    def prepare(self, stage: int, bucket: int, call: StageCall | None = None) -> None:
        """Make the program of a stage for batches of up to `bucket` rows; `call` replaces the stage in it."""
        if bucket not in self._buckets:
            self._buckets[bucket] = _Bucket(self._slots, self.results, bucket, self._n_classes)
        with self.stream.use():
            self._slots.on_device.fill_(SCRATCH)
        if call is None:  # not `or`: what torch.compile returns has no truth value
            call = self._stages[stage]
        self.programs[stage, bucket] = self.stream.prepare(partial(self._program, stage, bucket, call))
        if stage == 0 and self._canvas_px:
            self._cuts.host.copy_(torch.tensor(cut(self._image_shape[0], self._image_shape[1], self._image_shape)))
            with self.stream.use():
                self._cuts.on_device.copy_(self._cuts.host)
            self._resizers[bucket] = self.stream.prepare(partial(self._resize, bucket))

    def launch(
        self, stage: int, bucket: int, slots: list[int], begin: list[SlotState], with_logits: bool = True
    ) -> Running:
        """See `slotted.Lane`. If the launch fails half-way, `collect` raises the error, in turn: what is on the stream
        by then still reads this turn's buffers and writes to the rows' slots."""
        n_rows, views, turn = len(slots), self._buckets[bucket], self._turn
        self._turn = 1 - turn
        with_logits, mark = with_logits or self._score is None, self._marks[turn]
        try:
            views.fill(turn, slots)
            places = places_of(begin)
            self._slots.send[turn](0, 0, bucket)
            if self._canvas_px > 0 and NOWHERE in places:
                self._lay_out(turn, begin)
                self._canvases.send[turn](0, 0, n_rows)
                self._cuts.send[turn](0, 0, n_rows)
                self._resizers[bucket]()
            elif begin:
                self._send(places)
            self.programs[stage, bucket]()
            self.results.receive[turn](0, 0, views.result_bytes[with_logits])
            mark.record()
        except Exception as error:  # from torch or CUDA
            return Running(partial(self._fail, error), self.stream.query)
        return Running(partial(self._collect, n_rows, views, turn, mark, with_logits), mark.query)

    def _fail(self, error: Exception) -> NoReturn:
        self.stream.wait()
        raise error

    def _collect(
        self, n_rows: int, views: "_Bucket", turn: int, mark: Mark, with_logits: bool
    ) -> tuple[NDArray[np.float32], Heads | None]:
        mark.synchronize()  # the only synchronisation of a batch
        # A copy, as the next batch but one overwrites the buffer.
        logits = views.logits[turn][:n_rows].copy() if with_logits else NO_LOGITS
        if self._score is None:
            return logits, None
        # Through bytes: numpy would release the interpreter lock, and getting it back takes longer than this copy.
        numbers = np.frombuffer(bytes(views.numbers[turn][: n_rows * N_NUMBERS])).reshape(n_rows, N_NUMBERS)
        return logits, Heads(numbers[:, 0].astype(np.int64), numbers[:, 1], numbers[:, 2])

    def _send(self, places: list[int]) -> None:
        """Send pictures of the network's size from their places."""
        start = 0
        for first, n_rows in stretches(places):
            self._send_pictures(start, first, n_rows)
            start += n_rows

    def seconds(self, stage: int, bucket: int, repeats: int) -> float:
        """The mean time of a program over `repeats` runs, launched back to back."""
        program = self.programs[stage, bucket]
        program()
        self.stream.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            program()
        self.stream.wait()
        return (time.perf_counter() - started) / repeats

    def _program(self, stage_index: int, bucket: int, call: StageCall) -> None:
        stage, slots = self._stages[stage_index], self._slots.on_device[:bucket]
        carried = [name for name in stage.inputs if name != IMAGES]
        inputs = dict(zip(carried, self._values.gather(carried, slots), strict=True))
        inputs[IMAGES] = self._images[:bucket]
        outputs = call(*(inputs[name] for name in stage.inputs))
        made = zip(stage.outputs, outputs, strict=True)
        self._values.scatter({name: value for name, value in made if name in self._values}, slots)
        heads, logits = _parts(self.results.on_device, bucket, self._n_classes)
        if self._score is not None:
            self._kernels.judge(outputs[0], self._score, heads)
        logits.copy_(outputs[0])

    def _lay_out(self, turn: int, begin: Sequence[SlotState]) -> None:
        """Write images of any size into the corners of the canvases."""
        canvases, cuts, pictures = self._canvases.arrays[turn], self._cuts.arrays[turn], self._pictures.numpy()
        for i, row in enumerate(begin):
            image = row.block.values[IMAGES] if row.place == NOWHERE else pictures[row.place]
            height, width = image.shape[:2]
            canvases[i, :height, :width] = image
            cuts[i] = cut(height, width, self._image_shape)

    def _resize(self, bucket: int) -> None:
        canvases, cuts = self._canvases.on_device[:bucket], self._cuts.on_device[:bucket]
        dtype = torch.float32 if canvases.device.type == "cpu" else torch.float16
        self._images[:bucket].copy_(resize(canvases, cuts, self._image_shape, dtype))


class _Pair:
    """`N_TURNS` buffers on the host, pinned if `device.pins`, and one on the device. None ever moves.

    Attributes:
        turns, arrays: the buffers on the host, by turn.
        send, receive: copy from them to the device and back, by turn.
    """

    def __init__(self, device: Device, stream: Stream, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.turns = [torch.zeros(shape, dtype=dtype, pin_memory=device.pins) for _ in range(N_TURNS)]
        self.host, self.on_device = self.turns[0], torch.zeros(shape, dtype=dtype, device=device.kind)
        self.arrays = [host.numpy() for host in self.turns]
        self.send = [stream.copier(self.on_device, host) for host in self.turns]
        self.receive = [stream.copier(host, self.on_device) for host in self.turns]


class _Bucket:
    """Views of the lane's buffers for batches of one bucket, made once because making them takes time.

    Attributes:
        result_bytes: the size of the results without logits, and with them.
    """

    def __init__(self, slots: _Pair, results: _Pair, bucket: int, n_classes: int) -> None:
        n_bytes = bucket * 8 * N_NUMBERS
        self.result_bytes = (n_bytes, n_bytes + bucket * 4 * n_classes)
        # By turn.
        self._slots = [host[:bucket].numpy().data for host in slots.turns]
        self._format = struct.Struct(f"{bucket}q")
        parts = [_parts(host, bucket, n_classes) for host in results.turns]
        self.numbers = [numbers.view(-1).numpy().data for numbers, _ in parts]
        self.logits: list[NDArray[np.float32]] = [logits.numpy() for _, logits in parts]

    def fill(self, turn: int, slots: list[int]) -> None:
        """Write the slots of a batch, padded with `SCRATCH`. `struct` is faster at this than numpy."""
        rest = [SCRATCH] * (len(self._slots[turn]) - len(slots))
        self._format.pack_into(self._slots[turn], 0, *slots, *rest)


def _parts(results: Tensor, bucket: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Views of a buffer of bytes: the heads of `bucket` rows [rows, N_NUMBERS], and their logits [rows, classes]."""
    middle = bucket * 8 * N_NUMBERS
    end = middle + bucket * 4 * n_classes
    heads = results[:middle].view(torch.float64).view(bucket, N_NUMBERS)
    return heads, results[middle:end].view(torch.float32).view(bucket, n_classes)
