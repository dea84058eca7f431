"""Lets only one process (or group) train in a run's folder: two would overwrite each other's checkpoints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from training.checkpoint import RunError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder (created if missing) for training until the context exits or the process ends, however it ends.

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
        except OSError:  # a file system without locks: train unprotected
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if [*folder.iterdir()] == [lock]:  # training was refused before it wrote anything
                lock.unlink()
                folder.rmdir()
