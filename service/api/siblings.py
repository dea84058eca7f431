"""Limits how many images of one form are in flight: each one that ends wakes one that waits."""

import asyncio
from collections import deque
from math import isinf
from time import perf_counter


class Siblings:
    """Counts a form's images in flight, and wakes its waiting ones in FIFO order. Used on the event loop only.

    No waiter is lost: an image waits only while another is in flight, and every one that ends wakes one.
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
            if not waiting.done():  # else its deadline has passed
                waiting.set_result(None)
                return

    async def step_back(self, deadline_s: float) -> bool:
        """Take an image that found no room out of flight while it waits; returns as `wait` does."""
        self.n_in_work -= 1
        try:
            return await self.wait(deadline_s)
        finally:
            self.n_in_work += 1

    async def wait(self, deadline_s: float) -> bool:
        """Wait until another image ends (True) or the deadline, in `perf_counter` seconds, passes (False)."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        left_s = None if isinf(deadline_s) else max(0.0, deadline_s - perf_counter())
        await asyncio.wait([waiting], timeout=left_s)
        return not waiting.cancel()
