"""The runner: a network's stages as programs on a device, and the values that rows keep there."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models.bundle import Bundle
from models.staging import Stage
from service.runners.base import FatalRunnerError, RunnerError
from service.runners.blocks import Array, Block
from service.runners.limits import is_out_of_memory, words_of
from service.runners.slots import SlotState, stretches
from service.runners.slotted import DEFAULT_LANES, IMAGES, MANY_NUMBERS, SlotRunner
from service.runners.torch_cuda.compiling import COMPILERS, Compilers, try_compilers
from service.runners.torch_cuda.device import Cuda, Device, Host
from service.runners.torch_cuda.growing import rooms
from service.runners.torch_cuda.joined import make_bias_relu
from service.runners.torch_cuda.kernel_making import make_kernels
from service.runners.torch_cuda.kernels import Ways
from service.runners.torch_cuda.lane import Lane, StageCall
from service.runners.torch_cuda.memory import Values
from service.runners.torch_cuda.network import cut, load_network, lower
from service.runners.torch_cuda.scoring import SCORES

CAPTURE_FAILED = "previous error during capture"
MANY_BYTES = 1 << 20  # of pictures
MANY_RUNS = 4
COPY_THREADS = 8  # an H200's host copied no faster with 16


class TorchCudaRunner(SlotRunner[Lane]):
    """Runs a network's stages as CUDA graphs; see `base.Runner` for the contract.

    A row's logits depend on the other rows of its batch only through the batch's bucket: libraries choose different
    algorithms for different sizes, and their results differ in the last bits.

    Args:
        network: with exits, in evaluation mode; see `models.staging.split`.
        image_shape: (height, width, 3) of the uint8 images.
        mean, std: of the network's normalisation.
        score: a key of `scoring.SCORES`, computed on the device; None leaves scores to the caller.
        max_rows: the largest batch; `warm_up` lowers it if the device has too little memory.
        max_in_flight_rows: images in flight at once; each has a slot on the device.
        device: by default the first GPU.
        dtype: of maps and convolutions.
        n_lanes: batches at once.
        canvas_px: `first_state` takes images of other sizes up to this side, which are cropped and scaled on the device
            (see `resize`); a batch with such an image is sent as canvases of this size. 0: it takes none.
        compilers: each turns a stage into an equivalent that may be faster. All are tried at the largest bucket, and
            the fastest is used there. The first `warm_up` includes the time to compile.
        ways: the optimisations to use. By default all with float16 on a GPU, else only the one that needs no GPU.

    Raises:
        RunnerError: the device has too little memory for the slots, or cannot run the stages; the logits overflow
            `dtype`; or a number is out of range.
        StagingError: the network cannot be split into stages.
    """

    runs_ahead = True

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
        n_lanes: int = DEFAULT_LANES,
        canvas_px: int = 0,
        compilers: Compilers | None = None,
        ways: Ways | None = None,
    ) -> None:
        self.device = device or Cuda()
        self.is_on_gpu = self.device.kind.type == "cuda"
        if self.is_on_gpu:
            torch.set_num_threads(min(COPY_THREADS, torch.get_num_threads()))
        self.score, self.canvas_px, self._compilers = score, canvas_px, compilers or {}
        self.compiled: dict[int, str] = {}  # stages replaced at the largest bucket, and by which compiler
        self.compiled_calls: dict[int, StageCall] = {}  # keeps their weights alive: graphs hold only addresses
        stages = cut(network, image_shape, mean, std)
        try:
            super().__init__(len(stages), image_shape, "uint8", max_rows, max_in_flight_rows, n_lanes)
            with torch.inference_mode():
                self.stages = self._lower(stages, dtype, ways)
                noise = torch.randint(0, 256, (2, *image_shape), generator=torch.Generator().manual_seed(0))
                images = noise.to(self.device.kind, torch.uint8)
                examples, self._n_classes = _run_once(self.stages, images, dtype)
                self.values = Values(examples, self.slots.n_slots, self.kernels, rooms(self.stages))
                self._open_lanes()
        except RunnerError:
            raise
        except RuntimeError as error:  # from torch's allocator, or a CUDA library
            if self._is_out_of_memory(error):
                raise RunnerError(
                    f"the device has no room for the state of {max_in_flight_rows} images in flight: lower "
                    f"--max-in-flight or --max-batch-rows ({words_of(error)})"
                ) from error
            kind = FatalRunnerError if self._is_lost(error) else RunnerError
            raise kind(f"torch {torch.__version__} cannot run the stages on this device: {words_of(error)}") from error

    def _allocate(self, shape: Sequence[int]) -> Array:
        pictures: Array = torch.zeros(tuple(shape), dtype=torch.uint8, pin_memory=self.device.pins).numpy()
        return pictures

    def _lower(self, stages: Sequence[Stage], dtype: torch.dtype, ways: Ways | None) -> list[Stage]:
        kind = self.device.kind
        if ways is None or dtype != torch.float16:
            ways = Ways() if self.is_on_gpu and dtype == torch.float16 else Ways.exact_alone()
        self.kernels = make_kernels(kind, ways)
        bias_relu = self.kernels.bias_relu if "bias_relu" in self.kernels else make_bias_relu(kind, dtype)
        return lower(stages, kind, dtype, bias_relu, self.kernels, ways)

    def first_state(self, image: Array) -> SlotState:
        if self.canvas_px and image.shape != self.image_shape and image.ndim == 3 and image.dtype == np.uint8:
            height_px, width_px, n_colours = image.shape
            if n_colours == 3 and 0 < height_px <= self.canvas_px and 0 < width_px <= self.canvas_px:
                state = self.slots.admit(has_place=False)
                state.block = Block({IMAGES: image}, 1)
                return state
        return super().first_state(image)

    def _copy(self, images: Array, which: Sequence[int], out: Array) -> None:
        """Copy with several threads if there is much to copy: one core copies some 5 GB/s, which is 30,000 images/s of
        224 px, and a GPU may take more. The threads are torch's: Python's would each wait for the interpreter twice.

        Small pictures are copied by one core, in less time than the engine takes for them. Torch releases the
        interpreter lock at every operation, and getting it back would take longer than that.
        """
        if out.nbytes < MANY_BYTES or out[0].size <= MANY_NUMBERS or not images.flags.writeable:
            return super()._copy(images, which, out)
        source, target = torch.from_numpy(images), torch.from_numpy(out)
        runs = stretches(list(which))
        if len(runs) > MANY_RUNS:
            torch.index_select(source, 0, torch.tensor(which), out=target)
            return
        start = 0
        for first, n_images in runs:
            target[start : start + n_images].copy_(source[first : first + n_images])
            start += n_images

    @torch.inference_mode()
    def _open_lane(self) -> Lane:
        options = (self._n_classes, self.score, self.max_rows, torch.from_numpy(self.pictures), self.canvas_px)
        return Lane(self.device, self.stages, self.values, self.kernels, self.image_shape, *options)

    def _prepare(self) -> None:
        super()._prepare()
        for stage in range(self.n_stages if self._compilers else 0):
            try_compilers(self, stage, self._compilers)

    def _is_lost(self, error: Exception) -> bool:
        return self.device.is_lost()

    def _is_out_of_memory(self, error: Exception) -> bool:
        """Whether an error, or the one during whose handling it was raised, means that memory has run out.

        It may also surface as an invalid capture. In a capture, torch may try to free memory before it reports that
        there is none; CUDA does not allow this and invalidates the capture (pytorch/pytorch, issue 159594).
        """
        errors = [e for e in (error, error.__context__) if e is not None]
        return any(
            isinstance(e, torch.OutOfMemoryError) or is_out_of_memory(e) or CAPTURE_FAILED in str(e) for e in errors
        )

    def _release_memory(self) -> None:
        self.device.release_memory()


def open_torch_runner(
    bundle: Bundle,
    max_rows: int,
    max_in_flight_rows: int,
    n_lanes: int | None = None,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    compile_stages: bool = False,
    canvas_px: int = 0,
) -> TorchCudaRunner:
    """Open the runner of a bundle.

    Args:
        device: by default the first GPU.
        dtype: by default half precision on a GPU, float32 on the host.
        compile_stages: whether `COMPILERS` are tried on every stage, which takes minutes.
        canvas_px: see `TorchCudaRunner`.

    Raises:
        RunnerError: there is no GPU, or the network cannot be rebuilt; else see `TorchCudaRunner`.
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
        n_lanes or DEFAULT_LANES,
        canvas_px=canvas_px,
        compilers=COMPILERS if compile_stages else None,
    )


def _run_once(stages: Sequence[Stage], images: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Run all stages; returns the values that a later stage reads, by name, and the number of classes.

    Raises:
        RunnerError: a later stage reads the images; or logits are not finite: float16 ends at 65,504. Every image would
            run through all stages, for an answer computed from infinities.
    """
    state = {IMAGES: images}
    for i, stage in enumerate(stages):
        if i and IMAGES in stage.inputs:
            raise RunnerError(f"stage {i + 1} reads the images, which only the first one can: choose the runner onnx")
        state.update(zip(stage.outputs, stage(*(state[name] for name in stage.inputs)), strict=True))
        if not bool(state[stage.outputs[0]].isfinite().all()):  # waits for the device, once per stage
            raise RunnerError(
                f"stage {i + 1} gives logits that are not finite with maps in {str(dtype)[6:]}, which ends at "
                f"{torch.finfo(dtype).max:,.6g}: choose the runner onnx"
            )
    read = {name for stage in stages for name in stage.inputs} - {IMAGES}
    return {name: state[name] for name in sorted(read)}, state[stages[0].outputs[0]].shape[1]
