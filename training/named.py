"""TOML files that ship with the project, found by name; people's own, by path."""

from pathlib import Path

from training.errors import TrainingError


def find_toml(name_or_path: str, folder: Path, kind: str, error: type[TrainingError]) -> Path:
    """Return the file of a `kind` by the name of one that ships in `folder`, or by a path that ends in .toml.

    Raises:
        error: there is none; the message lists those that ship.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = folder / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise error(f"no {kind} {name_or_path!r}; choose from {known}, or give the path of a .toml file")
    return path
