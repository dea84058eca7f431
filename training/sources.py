"""The version of this code, for records of runs; imports nothing slow."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The git commit of these sources, with a note on uncommitted changes; None if they are not in a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + (" (with uncommitted changes)" if changed.stdout.strip() else "")
