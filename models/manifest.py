"""The schema of a bundle's `manifest.json`: its fields and their bounds. Unknown fields are refused."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

FORMAT_VERSION = 3  # 2 added `family` and `predictor`, 3 `int8`
MAX_EXITS = 256
MAX_ROW_VALUES = 2**28  # numbers in one value of one row; the largest image has fewer

Text = Annotated[str, Field(max_length=10_000)]
# A path component that is valid on every system: no separators, no leading dot.
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$"
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=NAME)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Mega = Annotated[float, Field(ge=0, le=1e12)]
Accuracy = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Side = Annotated[int, Field(ge=1, le=8192)]
Dtype = Literal["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "int8", "bool"]


def _plain_path(path: str) -> str:
    if len(path) > 500:
        raise ValueError("a path of more than 500 characters")
    for part in path.split("/"):
        if not part or part.startswith(".") or not part.isprintable() or set(part) & set('\\:*?"<>|'):
            raise ValueError(f"{path!r} is not a plain relative path inside the bundle")
    return path


RelativePath = Annotated[str, AfterValidator(_plain_path)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class InputInfo(_Strict):
    """The network's input images; stage 1 takes uint8 pixels and normalises them."""

    height_px: Side
    width_px: Side
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]  # per channel, of pixels in 0..1
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]


class ExitInfo(_Strict):
    """One exit: its cumulative cost and its accuracy."""

    published_mflops: Mega  # millions of multiply-adds as papers count them
    executed_mflops: Mega  # as the stages run them, and as charged
    macs_m: Mega  # convolutions and linear layers only, as published
    executed_macs_m: Mega  # the same, as executed
    test_accuracy: Accuracy | None
    heldout_accuracy: Accuracy


class ValueInfo(_Strict):
    """An input or output of a stage; its shape is without the batch axis."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=10**9)]], Field(max_length=8)]
    dtype: Dtype

    @model_validator(mode="after")
    def _fits_in_memory(self) -> Self:
        if prod(self.shape) > MAX_ROW_VALUES:
            raise ValueError(f"{self.name!r} has the shape {self.shape}: more than {MAX_ROW_VALUES} numbers per row")
        return self


class StageInfo(_Strict):
    """One graph: its inputs, from the image or earlier stages, and its outputs, its exit's logits first."""

    file: RelativePath
    inputs: Annotated[list[ValueInfo], Field(min_length=1, max_length=1000)]
    outputs: Annotated[list[ValueInfo], Field(min_length=1, max_length=1000)]
    state_bytes_per_row: Count  # kept for a row that goes on after this stage


class PredictorInfo(_Strict):
    """The weights of a fitted exit score, see `models.predictor.Predictor`: one row per exit, the bias last."""

    features: Annotated[list[Name], Field(min_length=1, max_length=100)]
    gain: Annotated[list[list[float]], Field(min_length=1, max_length=MAX_EXITS)]
    loss: Annotated[list[list[float]], Field(min_length=1, max_length=MAX_EXITS)] | None

    @model_validator(mode="after")
    def _one_weight_a_feature(self) -> Self:
        for rows in (self.gain, self.gain if self.loss is None else self.loss):
            if len(rows) != len(self.gain) or any(len(row) != len(self.features) + 1 for row in rows):
                raise ValueError(f"a row must have {len(self.features)} weights and a bias; one row per exit")
        return self


class ExitAccuracy(_Strict):
    """The accuracy of one exit."""

    test_accuracy: Accuracy | None
    heldout_accuracy: Accuracy


class Int8Info(_Strict):
    """The same network with 8-bit weights and activations, and its own measurements."""

    stages: Annotated[list[StageInfo], Field(min_length=1, max_length=MAX_EXITS)]
    exits: Annotated[list[ExitAccuracy], Field(min_length=1, max_length=MAX_EXITS)]
    predictor: PredictorInfo | None  # as the manifest's own, fitted to the outputs of these stages
    range_images: Count  # training images that activation ranges were measured on
    made_with: Text


class DataInfo(_Strict):
    """The images for training, calibration (held out) and testing."""

    name: Text
    split_sha256: Sha256 | None  # of the stored split; null if there is none
    train_images: Count
    heldout_images: Annotated[int, Field(ge=1, le=10**9)]
    test_images: Count


class FileInfo(_Strict):
    """The expected digest and size of a file of the bundle."""

    sha256: Sha256
    bytes: Count


class Manifest(_Strict):
    """The description of a bundle.

    Raises:
        ValidationError: a field is unknown, missing, of another type or out of bounds, or fields contradict each other.
    """

    format_version: Literal[1, 2, 3]
    name: Name
    version: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]  # a digest over all other files
    description: Text
    architecture: Name  # "onnx" if the network is not one of this project's
    arguments: dict[str, JsonValue]
    class_names: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(min_length=2, max_length=1_000_000)]
    input: InputInfo
    temperatures: Annotated[list[float], Field(max_length=MAX_EXITS)]
    exits: Annotated[list[ExitInfo], Field(min_length=1, max_length=MAX_EXITS)]
    stages: Annotated[list[StageInfo], Field(min_length=1, max_length=MAX_EXITS)]
    score: Name  # the exit score to serve with
    family: Name | None = None  # of thresholds; null: chosen when building the frontier
    predictor: PredictorInfo | None = None  # the weights of a fitted score
    int8: Int8Info | None = None  # stages in int8; null if there are none
    training: dict[str, JsonValue]
    data: DataInfo
    files: Annotated[dict[RelativePath, FileInfo], Field(max_length=10_000)]

    @model_validator(mode="after")
    def _costs_rise(self) -> Self:
        executed = [exit_.executed_mflops for exit_ in self.exits]
        whole = [round(mflops * 1e6) for mflops in executed]  # as the budget counts them
        if not whole[0] > 0 or not all(a < b for a, b in pairwise(whole)):
            raise ValueError(
                "executed_mflops must be cumulative: positive and rising from exit to exit, in whole multiply-adds, "
                f"not {executed}"
            )
        for field in ("published_mflops", "macs_m", "executed_macs_m"):
            costs = [getattr(exit_, field) for exit_ in self.exits]
            if not all(a <= b for a, b in pairwise(costs)):
                raise ValueError(f"{field} must be cumulative and must not decrease from exit to exit: {costs}")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        self._check_stages(self.stages)
        if self.int8 is not None:
            if len(self.int8.exits) != len(self.exits) or (self.int8.predictor is None) != (self.predictor is None):
                raise ValueError("int8 must have every exit's accuracy, and a predictor if and only if fp32 has one")
            self._check_stages(self.int8.stages)
        return self

    def _check_stages(self, stages: Sequence[StageInfo]) -> None:
        """Check that every stage returns logits of all classes first, and reads only the image or earlier outputs."""
        if len(stages) != len(self.exits):
            raise ValueError(f"{len(stages)} stages for {len(self.exits)} exits: there must be one per exit")
        first = stages[0].inputs
        image = [self.input.height_px, self.input.width_px, 3]
        if len(first) != 1 or first[0].shape != image or first[0].dtype != "uint8":
            raise ValueError(f"stage 1 must take one uint8 image of the shape {image}")
        given = {first[0].name: first[0]}
        for number, stage in enumerate(stages, start=1):
            for value in stage.inputs:
                if given.get(value.name) != value:
                    raise ValueError(f"stage {number} reads {value.name!r}, which no earlier stage gives in that form")
            logits = stage.outputs[0]
            if logits.shape != [len(self.class_names)] or logits.dtype != "float32":
                raise ValueError(f"stage {number} must return float32 logits of {len(self.class_names)} classes first")
            for value in stage.outputs:
                if value.name in given:
                    raise ValueError(f"stage {number} returns {value.name!r}, which exists already")
                given[value.name] = value

    @model_validator(mode="after")
    def _files_listed(self) -> Self:
        int8 = () if self.int8 is None else (*(stage.file for stage in self.int8.stages), "calibration_int8.npz")
        for file in (*(stage.file for stage in self.stages), "calibration.npz", *int8):
            if file not in self.files:
                raise ValueError(f"files must list {file!r}")
        if "manifest.json" in self.files:
            raise ValueError("files must not list manifest.json itself")
        return self

    def in_int8(self) -> "Manifest":
        """Return this manifest for the int8 stages, with theirs in place of the fp32 ones.

        Raises:
            ValueError: there are no int8 stages.
        """
        if self.int8 is None:
            raise ValueError("no int8 stages")
        exits = [
            exit_.model_copy(update=measured.model_dump())
            for exit_, measured in zip(self.exits, self.int8.exits, strict=True)
        ]
        changed = {"stages": self.int8.stages, "exits": exits, "predictor": self.int8.predictor}
        return self.model_copy(update=changed)
