"""Which sources made something; imports nothing that takes long."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The state of these sources; None where that cannot be told."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + (" (with uncommitted changes)" if changed.stdout.strip() else "")
