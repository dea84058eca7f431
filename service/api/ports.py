"""What the HTTP face asks of those behind it. They may live in this process or in another: the face doesn't know."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.budget.state import BudgetState
from service.budget.target import Target
from service.engine.rows import PLAIN, Options, Sink
from service.errors import EngineOverloaded
from service.tally import Outcome


class EnginePort(Protocol):
    """As `service.engine.engine.Engine`, which says more."""

    def start(self) -> None:
        """Wait until images are taken; raises what keeps the engine from it."""
        ...

    @property
    def canvas_px(self) -> int:
        """Up to which side images may have other sizes than the network's; 0: none may."""
        ...

    @property
    def is_alive(self) -> bool:
        """True from `start` until the engine has stopped or broken down."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why no image can be answered at the moment, None while they can."""
        ...

    @property
    def room(self) -> tuple[int, float]:
        """How many images may be in flight at the moment, and by how many seconds each of them makes a new one wait."""
        ...

    @property
    def has_room(self) -> bool:
        """False where `submit_to` would refuse, as things are."""
        ...

    def overload(self) -> EngineOverloaded:
        """Why, for whoever is refused early."""
        ...

    def submit_to(
        self, sink: Sink, token: Any, image: NDArray[np.uint8], options: Options = PLAIN, flush: bool = True
    ) -> Any:
        """Classify an image; (token, outcome) goes to `sink`. Returns what `abandon` takes; raises EngineError.

        Args:
            flush: False where others may follow at once; then the caller calls `flush` soon.
        """
        ...

    def flush(self) -> None:
        """Have the engine look at what was submitted."""
        ...

    def took(self, seconds: float) -> None:
        """Report how long after the last byte of its request an answer was there."""
        ...

    def abandon(self, request: Any) -> None:
        """Give a request up."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Take no more, and let go of the engine; returns whether all that was accepted had its outcome in time."""
        ...


class MetricsPort(Protocol):
    """Counts this event loop's requests, and shows the whole server's."""

    def count(self, outcome: Outcome) -> None: ...
    def decoded(self, seconds: float) -> None: ...
    def responded(self, exit_number: int, seconds: float) -> None: ...

    def exposition(self, is_ready: bool) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type. Waits: not for the event loop."""
        ...


class KeeperPort(Protocol):
    """As `service.budget.target.Keeper`. Both wait: not for the event loop."""

    def read(self) -> tuple[Target, BudgetState]: ...
    def set(self, target: Target) -> BudgetState: ...
