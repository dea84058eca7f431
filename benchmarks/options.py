"""Options that benchmarks share, checked before anything is measured: what is found wrong after minutes is lost."""

from pathlib import Path
from typing import Annotated

import typer


def writable(path: Path | None) -> Path | None:
    """The callback of options that name a file to write.

    Raises:
        typer.BadParameter: there is no folder for it.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent} to write it to")
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: give a file")
    return path


JsonPath = Annotated[
    Path | None, typer.Option("--json", callback=writable, help="Write everything measured to this file.")
]


def numbers(text: str, example: str, lowest: float = 0.0) -> list[float]:
    """Read numbers after commas.

    Raises:
        typer.BadParameter: it is not that, or one is below `lowest`; the message shows the example.
    """
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(lowest <= number < float("inf") for number in found):
        raise typer.BadParameter(f"{text!r}: give numbers from {lowest:g} on, after commas, as in {example}")
    return found
