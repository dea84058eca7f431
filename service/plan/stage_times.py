"""Times of stages and host, as a JSON file: measured on one machine, readable on any."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StageTimesError(ValueError):
    """A file of stage times that cannot be used; the message says why and what to do."""


class StageTimes(BaseModel):
    """Times of a network's stages on one machine, and of the engine's work beside them.

    Between measured sizes, times are interpolated. Beyond the largest, each row adds the average from the smallest to
    the largest. A batch smaller than the smallest measured size takes as long as that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(description="name and version of the bundle")
    machine: str = Field(description="where and when it was measured")
    n_lanes: int = Field(ge=1, le=4096, description="batches that run at once")
    n_cores: int = Field(ge=1, le=4096, description="CPU cores that lanes and host share")
    lanes_take_cores: bool = Field(description="stages run on the CPU: lanes and host slow each other")
    alone_speed: float = Field(1.0, ge=1, le=16, description="of a batch alone, relative to while all lanes run")
    stage_seconds: tuple[dict[Annotated[int, Field(ge=1)], Positive], ...] = Field(
        min_length=1,
        description="per stage, by rows of a batch: seconds while all lanes run, each on its own core",
    )
    spread: tuple[Positive, ...] = Field(
        (1.0,),
        min_length=1,
        description="of a batch's seconds, over the median of its stage and size: quantiles, evenly spaced",
    )
    copy_row_seconds: tuple[Seconds, ...] = Field(
        description="per stage: further seconds of a row that must be copied into its batch"
    )
    host_image_seconds: Seconds = Field(description="CPU time per image in the engine, outside its batches")
    host_batch_seconds: Seconds = Field(description="CPU time per batch in the engine, outside its run")
    wake_seconds: tuple[Seconds, ...] = Field(
        (0.0,),
        min_length=1,
        description="from a batch's end until the engine's thread has it, while all lanes run and it waits for a core: "
        "quantiles, evenly spaced, or one number",
    )

    @field_validator("wake_seconds", mode="before")
    @classmethod
    def _as_quantiles(cls, value: object) -> object:
        return (value,) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not all(self.stage_seconds):
            raise ValueError("every stage needs the time of at least one batch size")
        if len(self.copy_row_seconds) != len(self.stage_seconds):
            raise ValueError("copy_row_seconds must have one number per stage, like stage_seconds")
        return self

    @cached_property
    def _points(self) -> list[list[tuple[int, float]]]:
        """(rows, seconds) by stage, made monotonic: if fewer rows took longer, the machine was busy."""
        return [
            list(zip(rows, accumulate((by_rows[n] for n in rows), max), strict=True))
            for by_rows in self.stage_seconds
            for rows in [sorted(by_rows)]
        ]

    def seconds(self, stage: int, n_rows: int) -> float:
        """Seconds of a batch of adjacent rows while as many lanes run as have a core; stages from 0."""
        points = self._points[stage]
        least, most = points[0], points[-1]
        if n_rows <= least[0]:
            return least[1]  # fewer rows take no longer; how much less is unknown
        if n_rows > most[0]:
            # Not from the last two points: an error in one of them would double with every doubling of the rows.
            return _on_line(least if len(points) > 1 else (0, 0.0), most, n_rows)
        above = bisect_left(points, (n_rows, 0.0))
        return _on_line(points[above - 1], points[above], n_rows)

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "StageTimes":
        """Read a file written by `save` or by hand.

        Raises:
            StageTimesError: it cannot be read, or is not valid.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise StageTimesError(f"{path}: {error.strerror}; --save-stage-times writes such a file") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise StageTimesError(f"{path}: {where}: {first['msg']}; --save-stage-times writes such a file") from None


def _on_line(start: tuple[int, float], end: tuple[int, float], at: int) -> float:
    (x, y), (more_x, more_y) = start, end
    return y + (at - x) * (more_y - y) / (more_x - x)


def require_stages(times: StageTimes, stages: Sequence[object], path: Path) -> None:
    """Refuse times of a network with another number of stages.

    Raises:
        StageTimesError: the number of stages differs.
    """
    if len(times.stage_seconds) != len(stages):
        raise StageTimesError(
            f"{path}: times of {len(times.stage_seconds)} stages ({times.network}), but this network has "
            f"{len(stages)}; measure this network"
        )
