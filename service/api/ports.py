"""The interfaces that the HTTP layer depends on. Implementations may live in this process or in another."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.budget.state import BudgetState
from service.budget.target import Target
from service.engine.rows import PLAIN, Options, Sink
from service.errors import EngineOverloaded
from service.tally import Outcome


class EnginePort(Protocol):
    """The engine, as HTTP uses it; documented in full by `service.engine.engine.Engine`."""

    def start(self) -> None:
        """Block until the engine accepts images; raises the error that prevents it."""
        ...

    @property
    def canvas_px(self) -> int:
        """Largest side of images submitted at a size other than the network's; 0: none are accepted."""
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
        """How many images may be in flight at present, and the seconds of wait that each adds for a new one."""
        ...

    @property
    def has_room(self) -> bool:
        """False where `submit_to` would currently refuse an image."""
        ...

    def overload(self) -> EngineOverloaded:
        """The error for a request that is refused before it is submitted, with the predicted wait."""
        ...

    def submit_to(
        self, sink: Sink, token: Any, image: NDArray[np.uint8], options: Options = PLAIN, flush: bool = True
    ) -> Any:
        """Submit an image; `sink` receives (token, outcome). Returns a handle for `abandon`; raises EngineError.

        Args:
            flush: False to batch submissions; the caller must then call `flush` soon.
        """
        ...

    def flush(self) -> None:
        """Wake the engine for what was submitted with `flush=False`."""
        ...

    def took(self, seconds: float) -> None:
        """Report the seconds from the last byte of a request to its answer."""
        ...

    def abandon(self, request: Any) -> None:
        """Cancel a request: its outcome is no longer wanted."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Accept no more images and release the engine; returns whether all accepted ones got their outcome in time."""
        ...


class MetricsPort(Protocol):
    """Counts the requests of this event loop; exposes the counts of the whole server."""

    def count(self, outcome: Outcome) -> None: ...
    def decoded(self, seconds: float) -> None: ...
    def responded(self, exit_number: int, seconds: float) -> None: ...

    def exposition(self, is_ready: bool) -> tuple[bytes, str]:
        """The Prometheus exposition and its content type. Blocks: do not call on the event loop."""
        ...


class KeeperPort(Protocol):
    """See `service.budget.target.Keeper`. Both methods block: do not call on the event loop."""

    def read(self) -> tuple[Target, BudgetState]: ...
    def set(self, target: Target) -> BudgetState: ...
