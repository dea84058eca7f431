"""The images of one form: of those in work each that ends makes way for one that waits."""

import asyncio
from collections import deque
from math import isinf
from time import perf_counter


class Siblings:
    """Counts those that are in work, and wakes those that wait, in turn. Owned by the event loop.

    Whoever waits is woken: nobody waits unless another is in work, and every one that ends wakes one.
    """

    def __init__(self) -> None:
        self.n_in_work = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def begin_one(self) -> None:
        self.n_in_work += 1

    def end_one(self) -> None:
        self.n_in_work -= 1
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():  # else its time has passed
                waiting.set_result(None)
                return

    async def step_back(self, deadline_s: float) -> bool:
        """For one in work that has no place: let the others go on, and return as `wait` does."""
        self.n_in_work -= 1
        try:
            return await self.wait(deadline_s)
        finally:
            self.n_in_work += 1

    async def wait(self, deadline_s: float) -> bool:
        """Wait for the next to end, true; or for the deadline, of `perf_counter`, false."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        left_s = None if isinf(deadline_s) else max(0.0, deadline_s - perf_counter())
        await asyncio.wait([waiting], timeout=left_s)
        return not waiting.cancel()
