"""Training in one or several processes: this process's rank, and the few collective operations the loop needs.

On a CPU, two single-threaded processes trained 1.7 times as fast as one with two threads (412 against 245 images/s,
C-batch-4, bf16, two cores).
"""

import gc
import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from training.checkpoint import RunError
from training.launching import LAUNCHER, LOST_ANOTHER, orphaned


@dataclass(frozen=True)
class Processes:
    """The group of processes this one trains in; with a count of 1 every collective operation does nothing."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "Processes":
        """Join the group given by the environment (set by `training.launching` or torchrun), or run alone.

        Raises:
            RunError: there are fewer GPUs than processes.
        """
        count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        kind = torch.device(device)
        if kind.type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            n_here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
            if n_here > (n_gpus := torch.cuda.device_count()):  # checked in all, reported by rank 0
                raise RunError(f"{n_here} processes need one GPU each, but torch sees {n_gpus}: --processes {n_gpus}")
            kind = torch.device("cuda", local_rank)
            torch.cuda.set_device(kind)
        if count > 1:
            if kind.type == "cpu":
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
            # gloo too: stop flags are CPU tensors, so that checking them does not synchronise with the GPU.
            distributed.init_process_group("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo")
        return cls(rank, count, kind)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch. Shares are equal (a remainder is dropped), so means average correctly."""
        per_process = len(rows) // self.count
        return rows[self.rank * per_process : (self.rank + 1) * per_process]

    def wrap(self, network: nn.Module) -> nn.Module:
        """Average gradients over the processes; batch statistics stay local until `average_buffers`."""
        if self.count == 1:
            return network
        return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def average_buffers(self, network: nn.Module) -> None:
        """Average the BatchNorm statistics over the processes, each of which has seen different rows."""
        for buffer in network.buffers():
            if self.count > 1 and buffer.is_floating_point():
                distributed.all_reduce(buffer)
                buffer /= self.count

    def average_gradients(self, network: nn.Module) -> None:
        """Average the gradients of a small network that is not wrapped."""
        for parameter in network.parameters():
            if self.count > 1 and parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.count

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, returned in each of them."""
        total = values.clone()
        if self.count > 1:
            distributed.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process: all must stop at the same step."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.count > 1 else flag

    def leave(self) -> None:
        """Leave the group; the caller must have dropped every wrapped network.

        A wrapped network keeps the group alive, whose threads release tensors: doing so while the interpreter shuts
        down would abort the process.
        """
        if self.count > 1:
            gc.collect()
            distributed.destroy_process_group()


def end_if_lost(error: RuntimeError) -> None:
    """Exit without a message if the error means that another process of the group has ended: the launcher reports it.

    `os._exit`, because destroying a group that has lost a member may abort the process. Without our launcher (under
    torchrun), nothing is done.
    """
    if LAUNCHER in os.environ and ("gloo" in str(error) or isinstance(error, distributed.DistError)):
        sys.stdout.flush()
        os._exit(LOST_ANOTHER)


class StopRequest:
    """Notes SIGINT (Ctrl-C) and SIGTERM while entered, so that the loop can save first; a second Ctrl-C interrupts.

    Under our launcher only SIGTERM, as which Ctrl-C is passed on.
    """

    def __init__(self) -> None:
        self._noted = False
        self._numbers = (signal.SIGTERM,) if LAUNCHER in os.environ else (signal.SIGINT, signal.SIGTERM)

    @property
    def received(self) -> bool:
        """Whether a signal has arrived, or the launcher has ended and can no longer send one."""
        return self._noted or orphaned()

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def _note(self, _: int, __: FrameType | None) -> None:
        self._noted = True
        if signal.SIGINT in self._numbers:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if distributed.is_initialized():
            return  # the group stops together, and this process's own signal may still arrive
        for number, handler in self._before.items():
            signal.signal(number, handler)
