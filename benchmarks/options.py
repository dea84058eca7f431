"""Options shared by benchmarks, checked before the measurement, which takes minutes and would be lost."""

from pathlib import Path
from typing import Annotated

import typer


def writable(path: Path | None) -> Path | None:
    """Callback of options that name a file to write.

    Raises:
        typer.BadParameter: its folder does not exist, or it is a folder.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"cannot write {path.name}: there is no folder {path.parent}")
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: give a file")
    return path


JsonPath = Annotated[
    Path | None, typer.Option("--json", callback=writable, help="Also write all results to this JSON file.")
]


def numbers(text: str, example: str, lowest: float = 0.0) -> list[float]:
    """Parse comma-separated numbers.

    Raises:
        typer.BadParameter: not such a list, or a number below `lowest`; the message has the example.
    """
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(lowest <= number < float("inf") for number in found):
        raise typer.BadParameter(f"{text!r}: give comma-separated numbers of at least {lowest:g}, as in {example}")
    return found


def whole_numbers(text: str, example: str, lowest: int = 1) -> list[int]:
    """Parse comma-separated whole numbers; see `numbers`."""
    found = numbers(text, example, lowest)
    if any(number != int(number) for number in found):
        raise typer.BadParameter(f"{text!r}: give comma-separated whole numbers, as in {example}")
    return [int(number) for number in found]
