"""Which modules run compiled (`make compile`), and which of those have changed since.

Python prefers a compiled module to the source beside it, even if the source is newer.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PACKAGE = Path(__file__).parent
LIBRARY = "compiled__mypyc"  # the library that setup.py builds; the files beside the sources only load it


def compiled_sources(package: Path = PACKAGE) -> dict[Path, Path]:
    """Map each source that this Python replaces by compiled code to the file that it loads instead."""
    found = {}
    for suffix in EXTENSION_SUFFIXES:
        for path in package.rglob(f"*{suffix}"):
            name = path.name.removesuffix(suffix)
            if "." not in name and name != LIBRARY:  # a dot: built for another Python
                found[path.with_name(f"{name}.py")] = path
    return found


def stale_sources(package: Path = PACKAGE) -> list[Path]:
    """Sources that have changed or been removed since they were compiled."""
    # Compiling again rewrites the library alone: the files beside the sources keep their times.
    library_ns = max((path.stat().st_mtime_ns for path in package.glob(f"{LIBRARY}.*")), default=0)
    return sorted(
        source
        for source, path in compiled_sources(package).items()
        if not source.exists() or source.stat().st_mtime_ns > max(path.stat().st_mtime_ns, library_ns)
    )


def staleness(package: Path = PACKAGE) -> str | None:
    """A warning that names the stale sources and the remedy; None if there are none."""
    names = [source.relative_to(package.parent).as_posix() for source in stale_sources(package)]
    if not names:
        return None
    return (
        f"stale compiled code runs in place of {', '.join(names)}: `make compile` compiles them again, "
        "`make pure` removes all compiled code"
    )


def state(package: Path = PACKAGE) -> str:
    """A log message: whether the engine runs compiled."""
    count = len(compiled_sources(package))
    return f"the engine runs compiled: {count} modules" if count else "the engine runs as Python, not compiled"
