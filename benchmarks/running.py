"""Runs a benchmark as a command: what its user can mend is told in a sentence, and not as a stack trace."""

import sys
from collections.abc import Callable

import typer

from models.bundle import BundleError
from training.errors import TrainingError


def run(main: Callable[..., object]) -> None:
    """Run `main` on the command line's arguments; a bad bundle or image set ends with status 2."""
    try:
        typer.run(main)
    except (BundleError, TrainingError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
