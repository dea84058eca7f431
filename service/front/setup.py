"""The configuration that a worker receives at its start."""

import os
import pickle
from dataclasses import dataclass

from models.bundle import Bundle
from service.budget.target import Targets
from service.front.memory import Layout
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Setup:
    """Read and checked once, by the engine's process: a worker started later does not read files changed since."""

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
