"""The retry policy of both clients: how long to wait before a retry, and when to give up."""

import random
from math import inf
from time import monotonic

from service.client.errors import Later, ServerError, Unreachable

FIRST_S, MOST_S = 0.1, 2.0  # first and longest wait if the server names none; each is twice the one before
DOUBLED = 10  # limit on doublings, only to bound the power: MOST_S is reached long before


class Patience:
    """The retries of one call, which begins now.

    Args:
        retries: limit on their number.
        timeout_s: seconds from now within which the last try must begin; None for no limit.
    """

    def __init__(self, retries: float, timeout_s: float | None) -> None:
        self._retries = retries
        self._until_s = inf if timeout_s is None else monotonic() + timeout_s
        self._n_waits = 0

    @property
    def left_s(self) -> float:
        """Seconds left in which a try may begin."""
        return self._until_s - monotonic()

    def wait_s(self, error: ServerError) -> float:
        """Seconds to wait before the next try: as the server says, else exponential backoff with jitter.

        Raises:
            ServerError: `error` itself if a retry would not help or would begin too late, or none is left.
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
