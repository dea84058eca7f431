"""What a worker is told at its start."""

import os
import pickle
from dataclasses import dataclass

from models.bundle import Bundle
from service.budget.target import Targets
from service.front.memory import Layout
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Setup:
    """All of it, as the engine's process has read and checked it: a worker that starts later reads no other files."""

    bundle: Bundle
    targets: Targets
    settings: Settings
    admin_token: str | None
    layout: Layout

    def write(self, descriptor: int) -> None:
        os.pwrite(descriptor, pickle.dumps(self), 0)

    @staticmethod
    def read(descriptor: int) -> "Setup":
        setup = pickle.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        assert isinstance(setup, Setup)
        return setup
