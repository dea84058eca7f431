"""How long a client waits before it asks again, and when it gives up: for both, which differ in how they wait."""

import random
from math import inf
from time import monotonic

from service.client.errors import Later, ServerError, Unreachable

FIRST_S, MOST_S = 0.1, 2.0  # waits where the server names none: doubled from one to the next
DOUBLED = 10  # times at most, which is far beyond MOST_S


class Patience:
    """Of one call, from now on.

    Args:
        retries: how often it may be made again.
        timeout_s: seconds in which the last try has to begin; None: as many as it takes.
    """

    def __init__(self, retries: float, timeout_s: float | None) -> None:
        self._retries = retries
        self._until_s = inf if timeout_s is None else monotonic() + timeout_s
        self._n_waits = 0

    @property
    def left_s(self) -> float:
        """Seconds until no further try may begin."""
        return self._until_s - monotonic()

    def wait_s(self, error: ServerError) -> float:
        """Seconds to wait before the next try: as the server says, else ever longer, and not all clients alike.

        Raises:
            ServerError: `error` itself, where to ask again does not help, or would come too late.
        """
        if not isinstance(error, Later | Unreachable) or self._n_waits >= self._retries:
            raise error
        wait_s = error.retry_after_s if isinstance(error, Later) else None
        if wait_s is None:
            wait_s = min(MOST_S, FIRST_S * 2 ** min(self._n_waits, DOUBLED)) * random.uniform(0.5, 1.0)
        if wait_s > self.left_s:
            raise error
        self._n_waits += 1
        return wait_s
