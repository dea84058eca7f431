"""Shared by the benchmarks' commands: errors that the user can fix are printed without a stack trace."""

import sys
from collections.abc import Callable
from pathlib import Path

import typer

from models.bundle import Bundle, BundleError
from service.budget.target import TargetError, Targets
from training.data import load_image_set
from training.errors import TrainingError
from training.image_set import DataError, ImageSet


def run(main: Callable[..., object]) -> None:
    """Run `main` on the command line's arguments; a bad bundle, image set or budget ends with status 2."""
    try:
        typer.run(main)
    except (BundleError, TargetError, TrainingError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def budget_of(bundle: Bundle, fraction: float) -> float:
    """A fraction of a network's full cost, in millions of multiply-adds.

    Raises:
        TargetError: it is below the cost of the first exit, or above the full cost.
    """
    return Targets(bundle.frontier(), bundle.costs_mflops).resolve("fraction", fraction).average_mflops


def images_for(bundle: Bundle, data: Path) -> ImageSet:
    """Read the image set at `data`, which must have a bundle's image size and classes.

    Raises:
        DataError: it cannot be read, or differs in size or classes.
    """
    size = bundle.manifest.input
    found = load_image_set(data, size.height_px)
    if found.test_images.shape[1:3] != (size.height_px, size.width_px):
        height_px, width_px = found.test_images.shape[1:3]
        raise DataError(
            f"{data}: images of {width_px} x {height_px} px, but {bundle.path} takes {size.width_px} x "
            f"{size.height_px}; give the images that it was trained on"
        )
    if found.class_names != bundle.manifest.class_names:
        raise DataError(f"{data}: its classes are not those of {bundle.path}; give the images that it was trained on")
    return found
