"""Packs a run that was trained, calibrated and evaluated into a bundle."""

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from models.boosting import temperatures_per_exit
from models.bundle import BundleError
from models.bundle_writing import check_target, write_bundle
from models.manifest import NAME
from models.staging import StagingError
from training.calibration import CalibrationRecord, ExitOutputs, load_trained
from training.checkpoint import RunError, RunFolder
from training.evaluation import Evaluation, calibration_of
from training.export import export_stages
from training.jei.record import SCORE, GateRecord, published_decision
from training.model_card import model_card
from training.objectives import network_arguments
from training.recipe import RECIPE_FOLDER, Recipe


def bundle_name(name: str | None, output: Path) -> str:
    """The given name or, by default, that of the folder `output`, with dashes in place of characters not allowed.

    Raises:
        RunError: the given name is not allowed.
    """
    if name is None:
        return re.sub(r"[^A-Za-z0-9_.+-]+", "-", output.resolve().name).strip("-.+") or "network"
    if not re.fullmatch(NAME, name):
        raise RunError(f"--name {name!r}: give letters, digits and _.+- only, beginning with a letter, a digit or _")
    return name


def pack(folder: RunFolder, output: Path, name: str, description: str | None = None, images: str | None = None) -> str:
    """Write the bundle of a run; a bundle at `output` is replaced once the new one is complete.

    Args:
        description: one line for the manifest and the model card; by default, see `describe`.
        images: what the images are and their licence terms, for the model card.

    Returns:
        Its version.

    Raises:
        RunError: an earlier step is missing, or the network can't be bundled.
    """
    made_by, recipe = folder.read_description(), folder.read_recipe()
    record = CalibrationRecord.load(folder)
    about = description or describe(recipe, record.data_name, len(record.class_names))
    evaluation = Evaluation.load(folder, record)
    network, _ = load_trained(folder, len(record.class_names), record.half_weights, record.ensemble)
    training = _training_info(made_by, record)
    if gates := GateRecord.load(folder):
        outputs = (ExitOutputs.load(path) for path in (folder.heldout, folder.test))
        costs = [result.executed_mflops for result in evaluation.exits]
        decided = (published_decision(part.scores[SCORE], part.correct, costs) for part in outputs)
        training["gates"] = gates.told(*decided)
    try:
        check_target(output, replace=True)
        with TemporaryDirectory() as made:
            contents = Path(made)
            # Exporting takes longest, so everything that may be missing is read before.
            calibration = calibration_of(ExitOutputs.load(folder.heldout))
            shutil.copyfile(folder.frontier_plot, contents / folder.frontier_plot.name)
            (contents / "README.md").write_text(model_card(name, about, recipe, record, evaluation, training, images))
            stages = export_stages(network, record.image_size_px, record.mean, record.std, contents)
            manifest = {
                "name": name,
                "description": about,
                "architecture": recipe.network.architecture,
                "arguments": _arguments(recipe, record),
                **_facts(recipe, record, evaluation),
                "stages": stages,
                "training": training,
            }
            return write_bundle(output, manifest, calibration, contents, replace=True).manifest.version
    except (BundleError, StagingError) as error:
        raise RunError(str(error)) from error


def describe(recipe: Recipe, images: str, n_classes: int) -> str:
    """One line: the recipe's description or, if that is a shipped recipe's and names other images, a generic one."""
    shipped = {Recipe.load(file.stem).description for file in RECIPE_FOLDER.glob("*.toml")}
    if images == "cifar100" or recipe.description not in shipped:
        return recipe.description
    network = " ".join(filter(None, (recipe.network.architecture, recipe.network.arguments.get("config"))))
    return f"{network} on {images}, {n_classes} classes"


def _arguments(recipe: Recipe, record: CalibrationRecord) -> dict[str, Any]:
    trained = {"temperatures": list(record.temperatures)} if recipe.objective.temperatures_move else {}
    fitted = {} if record.ensemble is None else record.ensemble.model_dump(mode="json")
    return {**network_arguments(recipe, len(record.class_names)), **trained, **fitted}


def _facts(recipe: Recipe, record: CalibrationRecord, evaluation: Evaluation) -> dict[str, Any]:
    temperatures = _arguments(recipe, record)["temperatures"]
    return {
        "class_names": record.class_names,
        "input": {
            "height_px": record.image_size_px,
            "width_px": record.image_size_px,
            "mean": list(record.mean),
            "std": list(record.std),
        },
        "temperatures": list(temperatures_per_exit(temperatures, len(evaluation.exits))),
        **evaluation.manifest_fields(),
        "data": {
            "name": record.data_name,
            "split_sha256": record.split_sha256,
            "train_images": record.train_images,
            "heldout_images": record.heldout_images,
            "test_images": record.test_images,
        },
    }


def _training_info(made_by: dict[str, Any], record: CalibrationRecord) -> dict[str, Any]:
    # The path of the images on the training machine is private.
    command = re.sub(r"(--data[ =])\S+", r"\1DATA", made_by["command"])
    return {
        "recipe": made_by["recipe"],
        "seed": made_by["seed"],
        "images_sha256": made_by["data"].get("images_sha256"),
        "epochs": record.epochs,
        "seconds": round(record.seconds),
        "commit": made_by["commit"],
        "command": command,
        "processes": made_by["processes"],
        "machine": made_by["machine"],
        "torch": made_by["torch"],
        "python": made_by["python"],
        "temperatures": list(record.temperatures),
        # What precision `auto` resolved to; and the bundle that training started from, with its record.
        **{name: made_by[name] for name in ("precision", "from", "before") if name in made_by},
    }
