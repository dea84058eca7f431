"""Tries compilers on stages, and replaces a stage at the largest bucket if that is faster (`--compile-stages`)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.staging import Stage
from service.runners.base import FatalRunnerError, RunnerError
from service.runners.slotted import IMAGES
from service.runners.torch_cuda.joined import by_cudnn
from service.runners.torch_cuda.lane import StageCall

if TYPE_CHECKING:
    from service.runners.torch_cuda.runner import TorchCudaRunner

Compiler = Callable[[Stage], StageCall]
Compilers = Mapping[str, Compiler]
logger = logging.getLogger(__name__)

COMPILED_GAIN = 1.03  # below it, noise would decide
COMPILED_REPEATS = 20
SAME = 0.02  # of the largest value: sums in half precision depend on the order


def compile_stage(stage: Stage) -> StageCall:
    """`torch.compile` for one shape. Stages are compiled separately, so that torch's recompilation limit, past which it
    silently runs the original, is never reached."""
    compiled: StageCall = torch.compile(stage, dynamic=False, fullgraph=True)
    return compiled


COMPILERS: Compilers = {"cuDNN": by_cudnn, "torch.compile": compile_stage}


@torch.inference_mode()
def try_compiler(runner: "TorchCudaRunner", stage: int, compiler: Compiler) -> StageCall:
    """Compile a stage, check its results, and prepare it on the first lane at the largest bucket.

    Keep what it returns while that program may run: it may have weights of its own, and a CUDA graph holds only their
    addresses.

    Raises:
        RunnerError: its results differ. The compiler may also raise errors of its own.
    """
    call = compiler(runner.stages[stage])
    _require_same(call, runner.stages[stage], _random_inputs(runner, stage))
    runner.lanes[0].prepare(stage, runner.max_rows, call)
    return call


def try_compilers(runner: "TorchCudaRunner", stage: int, compilers: Compilers) -> None:
    """Try all compilers on a stage at the largest bucket; whatever is fastest on the first lane is used on all lanes.

    Raises:
        FatalRunnerError: the device was lost meanwhile.
    """
    first, *others = lanes = runner.lanes
    bucket = runner.max_rows
    best = [lane.programs[stage, bucket] for lane in lanes]
    best_s = first.seconds(stage, bucket, COMPILED_REPEATS)
    for name, compiler in compilers.items():
        try:
            call = try_compiler(runner, stage, compiler)
            seconds = first.seconds(stage, bucket, COMPILED_REPEATS)
            if taken := seconds * COMPILED_GAIN < best_s:
                for lane in others:
                    lane.prepare(stage, bucket, call)
                best, runner.compiled[stage] = [lane.programs[stage, bucket] for lane in lanes], name
                runner.compiled_calls[stage] = call
        except Exception as error:  # of any type; the stage itself still serves
            if runner.device.is_lost():
                raise FatalRunnerError(f"stage {stage + 1} cannot be compiled: {error}") from error
            logger.warning("stage %d stays as it is, as %s failed: %s", stage + 1, name, error)
        else:
            times = (1e3 * seconds, bucket, 1e3 * best_s, "used" if taken else "not used")
            logger.info("stage %d by %s takes %.3f ms for %d images, else %.3f ms: %s", stage + 1, name, *times)
            best_s = seconds if taken else best_s
        for lane, program in zip(lanes, best, strict=True):  # all of them: the last may be the one that failed
            lane.programs[stage, bucket] = program


def _random_inputs(runner: "TorchCudaRunner", stage: int) -> list[Tensor]:
    shape = (runner.max_rows, *runner.image_shape)
    state = {IMAGES: torch.randint(0, 256, shape, dtype=torch.uint8, device=runner.device.kind)}
    for earlier in runner.stages[:stage]:
        state.update(zip(earlier.outputs, earlier(*(state[name] for name in earlier.inputs)), strict=True))
    return [state[name] for name in runner.stages[stage].inputs]


def _require_same(call: StageCall, stage: Stage, inputs: Sequence[Tensor]) -> None:
    """Check that `call` computes the same as `stage`, whatever the memory that it writes to held before.

    Raises:
        RunnerError: it does not.
    """
    expected = stage(*inputs)
    # The next allocations reuse the memory of these. cuDNN adds the output's previous contents times 0: NaN if NaN.
    poison = [torch.full_like(output, torch.nan) for output in expected for _ in range(2)]
    del poison
    for found, wanted in zip(call(*inputs), expected, strict=True):
        if not torch.allclose(found, wanted, rtol=0.0, atol=SAME * float(wanted.abs().max())):
            raise RunnerError("its results differ")
