"""Checks that a stage's graph has the inputs and outputs that the manifest describes.

Buffers and stores are laid out by the manifest. A graph with more classes than there are names, or with other shapes,
would break the engine at its first image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models.manifest import StageInfo, ValueInfo
from models.onnx_weights import StageLoadError

DTYPES = {"float": "float32", "double": "float64"}
"""ONNX type names that differ from numpy's."""


class InGraph(NamedTuple):
    """An input or output as the graph declares it.

    Attributes:
        dtype: ONNX's name of the element type, such as `float`.
        shape: with the rows axis; an entry that is not an integer leaves its size open. None if not declared.
    """

    name: str
    dtype: str
    shape: Sequence[object] | None


def check_agreement(path: Path, stage: StageInfo, inputs: Sequence[InGraph], outputs: Sequence[InGraph]) -> None:
    """Compare names, their order, types and shapes.

    Raises:
        StageLoadError: they differ; the message names `path`, the difference and the fix.
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
