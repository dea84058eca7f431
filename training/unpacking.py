"""Recreates a run from a bundle's weights, recipe and split, to calibrate, evaluate or export it again."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.bundle import WEIGHTS, BundleError, load_bundle
from training.averaging import Averaging
from training.checkpoint import Progress, RunError, RunFolder
from training.image_set import DataError, ImageSet, Split
from training.objectives import build_objective, network_of, trainable
from training.optimiser import optimiser_of
from training.recipe import Recipe

KEPT = ("seed", "processes", "commit", "command", "torch", "python", "machine")  # fields of run.json that a bundle has


def unpack(bundle_path: Path, folder: RunFolder, images: ImageSet) -> None:
    """Write the folder of the finished run: run.json, split.npz and checkpoint.pt, but no log.

    Args:
        images: the set that the bundle's network was trained on.

    Raises:
        RunError: the folder already holds a run, or the bundle is damaged or does not record how it was trained.
        DataError: these are other images, or their split differs.
    """
    if folder.description.exists():
        raise RunError(f"{folder.path}: holds a run already; give another folder")
    try:
        manifest = load_bundle(bundle_path).manifest
    except BundleError as error:
        raise RunError(str(error)) from error
    made_by: dict[str, Any] = dict(manifest.training)
    try:
        recipe, seed = Recipe.model_validate(made_by["recipe"]), int(made_by["seed"])
        epochs, seconds = float(made_by["epochs"]), float(made_by["seconds"])
        kept = {key: made_by[key] for key in KEPT}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{bundle_path}: its manifest does not record how it was trained ({error}); only bundles made "
            "by `python -m training export` can be unpacked"
        ) from error
    data = manifest.data
    if images.name != data.name:
        raise DataError(f"{bundle_path}: trained on {data.name!r}, but --data holds {images.name!r}")
    if images.image_size_px != manifest.input.height_px:
        raise DataError(
            f"{bundle_path}: trained on images of {manifest.input.height_px} px, but --data was read at "
            f"{images.image_size_px} px; read it at {manifest.input.height_px} px"
        )
    split = Split.make(len(images.train_labels), data.heldout_images, seed)
    if split.sha256 != data.split_sha256:
        raise DataError(f"{bundle_path}: --data gives another split of held-out images; give the original images")
    if (made_by.get("images_sha256") or images.sha256) != images.sha256:
        raise DataError(
            f"{bundle_path}: training images were added, removed or renamed since; give the original images"
        )
    network = network_of(recipe, len(images.class_names))
    _load_weights(network, bundle_path / WEIGHTS)
    # Gates are not stored in a bundle, so the recreated run has none.
    recipe = recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"gates": 0.0})})
    temperatures = list(made_by.get("temperatures", ()))  # older bundles have none: theirs were fixed
    if recipe.objective.temperatures_move:
        trainable(network, recipe.objective).boosting.temperatures = temperatures  # type: ignore[union-attr]
    step = round(epochs * recipe.optimisation.steps_per_epoch(len(split.train)))
    progress = Progress(step=step, seconds=seconds)
    if recipe.objective.final_temperatures is not None:
        progress.temperatures = temperatures
    folder.path.mkdir(parents=True, exist_ok=True)
    split.save(folder.split)
    folder.save_checkpoint(
        {
            **Averaging(network, recipe.optimisation.ema_decay).state(),
            **build_objective(recipe.objective, network).state(),
            "optimiser": optimiser_of(network, recipe.optimisation).state_dict(),
            "progress": vars(progress),
        }
    )
    description: dict[str, Any] = {
        **kept,
        "recipe": recipe.model_dump(),
        "data": images.described(split),
        **{name: made_by[name] for name in ("precision", "from", "before") if name in made_by},
        "unpacked_from": f"{manifest.name} {manifest.version}",
    }
    folder.description.write_text(json.dumps(description, indent=2) + "\n")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a bundle's weights, as they are stored.

    Raises:
        RunError: they can't be read.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: can't be read ({error})") from error


def _load_weights(network: nn.Module, path: Path) -> None:
    """Those stored in half precision are widened."""
    stored, wanted = read_weights(path), network.state_dict()
    try:
        network.load_state_dict({name: value.to(wanted[name].dtype) for name, value in stored.items()})
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"{path}: not the weights of the bundle's own recipe ({reason})") from error
