"""One process, or one group of them, trains in a run's folder: two would write over each other's checkpoints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from training.checkpoint import RunError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep others from training in a folder, which is made if new, until this is left or the process ends in any way.

    Raises:
        RunError: another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"
    with lock.open("a+") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{folder}: another process trains here (pid {file.read() or 'unknown'}): wait for it to end, "
                "stop it with `kill` (it saves first), or give another folder"
            ) from None
        except OSError:  # a file system that knows no locks: nobody is kept away
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if [*folder.iterdir()] == [lock]:  # whatever was to be trained was refused
                lock.unlink()
                folder.rmdir()
