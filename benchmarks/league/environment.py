"""A virtual environment for the peers, separate from the project's."""

import subprocess
import sys
from functools import cache
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def make(folder: Path) -> Path:
    """Return the interpreter of a virtual environment with `requirements.txt`, creating it if necessary.

    If the packages cannot be installed together, they are installed one by one; `missing` finds those that failed.
    """
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if done.is_file() and done.read_text() == REQUIREMENTS.read_text():
        return python
    print(f"installing the peers into {folder} (minutes, once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--requirement", str(REQUIREMENTS)]).returncode != 0:
        for line in REQUIREMENTS.read_text().splitlines():
            if line and not line.startswith("#"):
                subprocess.run([*pip, line])
    done.write_text(REQUIREMENTS.read_text())
    return python


@cache
def library_folder(python: Path) -> str:
    """The folder of `python`'s shared libraries, so that programs that embed Python load the right release."""
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR') or '')"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@cache
def missing(python: Path, package: str) -> str | None:
    """Why `python` cannot import `package`; None if it can."""
    done = subprocess.run([str(python), "-c", f"import {package}"], capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return None
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return f"{package} cannot be imported: {reason}"
