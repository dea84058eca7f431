"""Which modules run compiled (`make compile`), and which of those have changed since.

Python prefers compiled code to the source beside it, however old it is.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PACKAGE = Path(__file__).parent
LIBRARY = "compiled__mypyc"  # holds all compiled code, by setup.py; the files beside the sources only point to it


def compiled_sources(package: Path = PACKAGE) -> dict[Path, Path]:
    """Sources in whose place this Python runs compiled code, and the file that it loads instead."""
    found = {}
    for suffix in EXTENSION_SUFFIXES:
        for path in package.rglob(f"*{suffix}"):
            name = path.name.removesuffix(suffix)
            if "." not in name and name != LIBRARY:  # with a dot: another Python's
                found[path.with_name(f"{name}.py")] = path
    return found


def stale_sources(package: Path = PACKAGE) -> list[Path]:
    """Those that have changed, or gone, since they were compiled."""
    # Compiling again leaves a file that only points to the library as old as it was.
    library_ns = max((path.stat().st_mtime_ns for path in package.glob(f"{LIBRARY}.*")), default=0)
    return sorted(
        source
        for source, path in compiled_sources(package).items()
        if not source.exists() or source.stat().st_mtime_ns > max(path.stat().st_mtime_ns, library_ns)
    )


def staleness(package: Path = PACKAGE) -> str | None:
    """A warning that names them and what to do; None where there are none."""
    names = [source.relative_to(package.parent).as_posix() for source in stale_sources(package)]
    if not names:
        return None
    return (
        f"compiled code that is older runs in the place of {', '.join(names)}: `make compile` compiles them again, "
        "`make pure` removes what is compiled"
    )


def state(package: Path = PACKAGE) -> str:
    """Whether the engine runs compiled, for the log."""
    count = len(compiled_sources(package))
    return f"the engine runs compiled: {count} modules" if count else "the engine runs as Python, not compiled"
