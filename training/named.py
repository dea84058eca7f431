"""Finds TOML files: those that ship with the project by name, others by path."""

from pathlib import Path

from training.errors import TrainingError


def find_toml(name_or_path: str, folder: Path, kind: str, error: type[TrainingError]) -> Path:
    """Return a file in `folder` by its name without .toml, or any file by a path that ends in .toml.

    Args:
        kind: what such a file is, for the message.

    Raises:
        error: there is no such file; the message lists those in `folder`.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = folder / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise error(f"no {kind} {name_or_path!r}; choose from {known}, or give the path of a .toml file")
    return path
