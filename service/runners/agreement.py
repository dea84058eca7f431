"""Whether a stage's graph reads and gives what the manifest says of it: batches are laid out by the manifest.

A graph of more classes than have names would break the engine at the first image; one of other shapes would write
where no room was made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models.manifest import StageInfo, ValueInfo
from models.onnx_weights import StageLoadError

DTYPES = {"float": "float32", "double": "float64"}
"""Whose names differ between ONNX and numpy."""


class InGraph(NamedTuple):
    """An input or output as a graph tells of it.

    Attributes:
        dtype: ONNX's name of it, such as `float`.
        shape: with the rows; what is no number is left open. None: nothing is told.
    """

    name: str
    dtype: str
    shape: Sequence[object] | None


def check_agreement(path: Path, stage: StageInfo, inputs: Sequence[InGraph], outputs: Sequence[InGraph]) -> None:
    """Compare names, their order, types and shapes.

    Raises:
        StageLoadError: naming `path`, what differs, and the fix.
    """
    for what, declared, found in (("reads", stage.inputs, inputs), ("gives", stage.outputs, outputs)):
        names, in_graph = [value.name for value in declared], [value.name for value in found]
        if names != in_graph:
            raise StageLoadError(
                f"{path}: the graph {what} {in_graph} where the manifest says {names}; export the bundle again"
            )
        for value, one in zip(declared, found, strict=True):
            if not _fits(value, one):
                kind = f"{DTYPES.get(one.dtype, one.dtype)} {list((one.shape or ())[1:])}"
                raise StageLoadError(
                    f"{path}: the graph {what} {value.name!r} as {kind} where the manifest says {value.dtype} "
                    f"{value.shape}; export the bundle again"
                )


def _fits(value: ValueInfo, found: InGraph) -> bool:
    sizes = value.shape if found.shape is None else found.shape[1:]
    return (
        DTYPES.get(found.dtype, found.dtype) == value.dtype
        and len(sizes) == len(value.shape)
        and all(not isinstance(size, int) or size == said for size, said in zip(sizes, value.shape, strict=True))
    )
