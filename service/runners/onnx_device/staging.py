"""Host memory for copies to and from a device, pinned (page-locked) if ONNX Runtime or torch can allocate such memory.

Copies from other memory go through a pinned buffer of CUDA's. Pinned memory is not released while the server runs.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from service.runners.blocks import Array
from service.runners.providers import CUDA

logger = logging.getLogger(__name__)

Pinned = Callable[[Sequence[int], Any], Array]


class Staging:
    """Makes arrays on the host for copies to and from a device.

    Args:
        kind: ONNX Runtime's name for the kind of device, "cpu" or "cuda"; memory is pinned for the latter.

    Attributes:
        how: "onnxruntime" or "torch", whichever allocates pinned memory; None if it is not pinned.
    """

    def __init__(self, kind: str) -> None:
        self.how: str | None = None
        self._pinned: Pinned | None = None
        for how, pinned in _ways() if kind == "cuda" else ():
            try:
                pinned((1,), np.dtype("uint8"))
            except Exception as error:  # of any type: an allocator, a library or a device is missing
                logger.info("host memory is not pinned by %s: %s", how, error)
                continue
            self.how, self._pinned = how, pinned
            break
        else:
            if kind == "cuda":
                logger.warning("host memory is not pinned: copies to and from the device take longer")

    def array(self, shape: Sequence[int], dtype: str) -> Array:
        """Return zeros. Write to the array in place: only its own memory is pinned."""
        if self._pinned is None:
            return np.zeros(shape, dtype)
        array = self._pinned(shape, np.dtype(dtype))
        array[...] = 0
        return array


def _ways() -> Iterator[tuple[str, Pinned]]:
    for device in ort.get_ep_devices():
        info = device.memory_info(ort.OrtDeviceMemoryType.HOST_ACCESSIBLE) if device.ep_name == CUDA else None
        if info is not None:
            yield "onnxruntime", lambda shape, dtype, info=info: _by_onnxruntime(shape, dtype, info)  # type: ignore[misc]
    if importlib.util.find_spec("torch") is not None:
        yield "torch", _by_torch


def _by_onnxruntime(shape: Sequence[int], dtype: Any, info: Any) -> Array:
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, memory_info=info)
    array: Array = value.numpy()  # a view, which keeps the value alive
    return array


def _by_torch(shape: Sequence[int], dtype: Any) -> Array:
    import torch

    like = torch.from_numpy(np.empty(0, dtype))
    array: Array = torch.empty(tuple(shape), dtype=like.dtype, pin_memory=True).numpy()
    return array
