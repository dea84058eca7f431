"""A recipe: everything that determines the result of a training run except the images and the seed. TOML on disk."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.errors import TrainingError
from training.named import find_toml

Share = Annotated[float, Field(gt=0, le=1)]
RECIPE_FOLDER = Path(__file__).parent / "recipes"
SET_ELSEWHERE = {  # arguments of networks that a recipe's [network] can't set, and where they come from
    "n_classes": "the class folders of the images",
    "image_size_px": "--image-size",
    "temperatures": "objective.temperatures",
    "gradient_rescaling": "objective.gradient_rescaling",
    "stop_gradient": "objective.stop_gradient",
    "head_scales": "`calibrate`",
}


class RecipeError(TrainingError):
    """A recipe that can't be used; the message names the field and the fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Network(_Section):
    """Arguments of `models.registry.build_network`; the number of classes comes from the image set."""

    architecture: str = "msdnet"
    arguments: dict[str, Any] = Field(default_factory=dict)


class Weighting(_Section):
    """Settings of `weighted`: how the network that weights each image's losses is trained (L2W-DEN)."""

    meta_interval: Annotated[int, Field(ge=1)] = 1  # training steps per step of the weighting network
    ratio: Annotated[float, Field(gt=0)] = 0.75  # of images leaving at an exit to those leaving at the exit before
    delta: Annotated[float, Field(gt=0, le=1)] = 0.8  # weights are within 2 delta of 1: above 0.5 some may be negative
    mean: Literal["mat", "col", "row"] = "col"  # over what weights are 1 on average: the batch, each image, each exit
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4  # of Adam, at the start: cosine decay
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4


class Objective(_Section):
    name: Literal["boosted", "joint", "weighted"] = "boosted"
    temperatures: list[float] = [0.5]  # 1, 2 (linear) or one per exit; `joint` and `weighted` are t = 0 and ignore them
    # Temperatures may change in training: linearly to these, or learned (starting between 0 and 1).
    final_temperatures: list[float] | None = None
    learned_temperatures: bool = False
    gradient_rescaling: Literal["off", "coarsest", "all"] = "coarsest"  # of the earlier stages (BoostNet Eq. 7)
    stop_gradient: bool = True
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Weight of the divergence of each earlier exit's softmax from the last exit's, both at this temperature.
    distillation: Annotated[float, Field(ge=0)] = 0.0
    distillation_temperature: Annotated[float, Field(gt=0)] = 2.0
    # Loss weight of one more output per earlier exit, which predicts whether a later exit corrects its answer.
    gates: Annotated[float, Field(ge=0)] = 0.0
    weighting: Weighting = Weighting()

    @property
    def temperatures_move(self) -> bool:
        return self.learned_temperatures or self.final_temperatures is not None

    @model_validator(mode="after")
    def _one_way_to_move(self) -> Self:
        if self.learned_temperatures and self.final_temperatures is not None:
            raise ValueError("set learned_temperatures or final_temperatures, not both")
        if self.temperatures_move and self.name != "boosted":
            raise ValueError(f"{self.name} is t = 0: leave out learned_temperatures and final_temperatures")
        return self

    @model_validator(mode="after")
    def _weighting_goes_with(self) -> Self:
        if self.name == "weighted" and (self.distillation or self.gates):
            raise ValueError("weighted does not support the other losses: leave out distillation and gates")
        if self.name != "weighted" and self.weighting != Weighting():
            raise ValueError(f"weighting belongs to weighted, not {self.name}: leave it out, or set name = 'weighted'")
        return self


class Optimisation(_Section):
    epochs: Annotated[int, Field(ge=1)] = 300
    batch_rows: Annotated[int, Field(ge=1)] = 64  # over all processes
    learning_rate: Annotated[float, Field(gt=0)] = 0.1  # the peak
    schedule: Literal["multistep", "cosine", "one_cycle"] = "multistep"
    milestones: list[int] = [150, 225]  # multistep: after these epochs ...
    decay: Annotated[float, Field(gt=0)] = 0.1  # ... the rate is multiplied by this
    warmup_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # one_cycle: share of the run in which the rate rises
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # > 0: evaluate and export a running average of the weights

    @model_validator(mode="after")
    def _nesterov_looks_ahead(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum: set momentum above 0, or nesterov = false")
        return self

    def steps_per_epoch(self, n_images: int) -> int:
        """Steps per epoch; a last batch under a quarter full is dropped: too few rows for batch statistics."""
        n_full, remainder = divmod(n_images, self.batch_rows)
        return n_full + (4 * remainder >= self.batch_rows)


class Numerics(_Section):
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # auto: bf16 where the device computes in it
    channels_last: bool = True
    # torch.compile of the network, by mode; `reduce-overhead` runs the whole pass as CUDA graphs. On two CPU cores it
    # gained nothing.
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"


class Augmentation(_Section):
    crop_padding_px: Annotated[int, Field(ge=0)] = 4
    # Random resized crops instead of padded ones: the smallest and largest share of the image's area.
    crop_area: tuple[Share, Share] | None = None
    # With `crop_area`: sizes to train at, each for an equal part of the run; small first is faster. Default: as read.
    sizes_px: list[Annotated[int, Field(ge=8)]] = []
    cutout_px: Annotated[int, Field(ge=0)] = 0  # side of a square painted over with the mean colour, at a random place
    cutmix: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of batches in which images get a rectangle of another one

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.crop_area is not None and self.crop_area[0] > self.crop_area[1]:
            raise ValueError("crop_area must be [smallest, largest]")
        if self.crop_area is not None and self.crop_padding_px:
            raise ValueError("crop_area resizes crops, crop_padding_px shifts them: set crop_padding_px = 0 with it")
        if self.sizes_px and self.crop_area is None:
            raise ValueError("sizes_px resizes crops: set crop_area too")
        return self

    def size_px(self, step: int, total_steps: int) -> int | None:
        """Image size to train at in this step; None: the size at which the images were read."""
        return self.sizes_px[step * len(self.sizes_px) // total_steps] if self.sizes_px else None


class Recipe(_Section):
    description: str
    network: Network
    objective: Objective = Objective()
    optimisation: Optimisation = Optimisation()
    numerics: Numerics = Numerics()
    augmentation: Augmentation = Augmentation()
    held_out_images: Annotated[int, Field(ge=2)] = 5000  # cross-fitting halves them

    @model_validator(mode="after")
    def _gates_see_one_class(self) -> Self:
        if self.objective.gates and self.augmentation.cutmix:
            raise ValueError("gates learn whether an answer is right, undefined for mixed images: leave out cutmix")
        return self

    @model_validator(mode="after")
    def _weighted_is_not_compiled(self) -> Self:
        if self.objective.name == "weighted" and self.numerics.compile != "off":
            raise ValueError("torch.compile does not support the derivatives that weighted needs: set compile = 'off'")
        return self

    @classmethod
    def load(cls, name_or_path: str, settings: Sequence[str] = ()) -> "Recipe":
        """Read a bundled recipe by name (`cifar100-fast`), or any recipe by path.

        Args:
            settings: changes to it, each `section.field=value` with a TOML value, e.g. `optimisation.epochs=5`.

        Raises:
            RecipeError: there is no such recipe, it is not valid TOML, or a field is wrong.
        """
        path = find_toml(name_or_path, RECIPE_FOLDER, "recipe", RecipeError)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin it with a mark
            for setting in settings:
                _change(values, setting)
            recipe = cls.model_validate(values)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not valid TOML: {error}") from error
        except ValidationError as error:
            lines = (f"  {'.'.join(map(str, e['loc']))}: {_what_is_wrong(e['loc'], e['msg'])}" for e in error.errors())
            raise RecipeError(f"{path}: these fields are wrong:\n" + "\n".join(lines)) from error
        if ignored := SET_ELSEWHERE.keys() & recipe.network.arguments:
            name = min(ignored)
            raise RecipeError(f"{path}: network.arguments.{name}: leave it out; it comes from {SET_ELSEWHERE[name]}")
        return recipe


def changes(one: Recipe, other: Recipe) -> list[str]:
    """Differences of two recipes, descriptions excepted, each as `section.field: first value, here second value`."""
    fields, others = (_flat(recipe.model_dump(exclude={"description"})) for recipe in (one, other))
    return [
        f"{name}: {fields.get(name, 'none')}, here {others.get(name, 'none')}"
        for name in dict.fromkeys([*fields, *others])
        if fields.get(name) != others.get(name)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _what_is_wrong(place: tuple[int | str, ...], message: str) -> str:
    """Pydantic's message or, for an unknown field, the list of known fields."""
    section: Any = Recipe
    for name in place:
        known = getattr(section, "model_fields", None)
        if known is None:
            return message
        if name not in known:
            return f"there is no such field; choose from {', '.join(known)}"
        section = known[name].annotation
    return message


def _change(values: dict[str, Any], setting: str) -> None:
    try:
        changes = tomllib.loads(setting)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"--set {setting}: not section.field=value with a TOML value ({error}); quote text, as in "
            "--set \"objective.name='joint'\""
        ) from error
    while changes:  # merged section by section, to keep the other fields
        key, change = changes.popitem()
        if isinstance(change, dict) and isinstance(values.get(key), dict):
            values, changes = values[key], change
        else:
            values[key] = change
