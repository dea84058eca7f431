"""Threads that decode large images; who would have to wait for them too long is told so at once.

Decoding is what clients can make most expensive, and the engine's own admission sees an image only when it is over: so
waiting for it has the same limit, and the same refusal. Used from event loops.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from time import perf_counter
from typing import Generic, TypeVar

from service.errors import EngineOverloaded, EngineTooLate

T = TypeVar("T")
KEPT = 0.9  # of what is known of the pace, at each decoding
# What is taken to be known at first: seconds and weight, as an ordinary processor takes for some photographs.
KNOWN_S, KNOWN_WEIGHT = 0.15, 1e7
MOST_TIMES = 4.0  # what was predicted is what one decoding may count: an odd one says little of those after it


class Decoding(Generic[T]):
    """A pool of threads that all do one thing to bytes.

    Args:
        decode: what they do.
        n_threads: how many there are.
        max_wait_s: longest wait, as predicted from the weight of those before and the pace of the latest.
        weigh: tells, in no time, about how much work it will be to decode something, in bytes of a photograph.
    """

    def __init__(
        self,
        decode: Callable[[bytes], T],
        n_threads: int,
        max_wait_s: float = math.inf,
        weigh: Callable[[bytes], int] = len,
    ) -> None:
        self._decode, self._n_threads, self._max_wait_s, self._weigh = decode, n_threads, max_wait_s, weigh
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix="decode")
        self._lock = Lock()  # over all below
        self._n_submitted = self._submitted_weight = 0  # and neither done nor given up
        self._seconds, self._weight = KNOWN_S, KNOWN_WEIGHT  # of the latest, which count the most

    def submit(self, body: bytes, deadline_s: float = math.inf) -> Future[T]:
        """Decode `body`. To cancel what comes back lets go of it, unless a thread has begun.

        Args:
            deadline_s: of `perf_counter`; one whose turn comes later fails with EngineTooLate.

        Raises:
            EngineOverloaded: it would have to wait too long.
        """
        weight = self._weigh(body)
        with self._lock:
            wait_s = self._predicted_s(self._submitted_weight) / self._n_threads
            if self._n_submitted >= self._n_threads and wait_s > self._max_wait_s:
                raise EngineOverloaded(self._n_submitted, wait_s)
            self._n_submitted += 1
            self._submitted_weight += weight
        held = [body]  # what is cancelled stays in the pool's queue until its turn: its bytes are not to
        future = self._threads.submit(self._run, held, weight, deadline_s)
        future.add_done_callback(lambda _: self._ended(held, weight))
        return future

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, held: list[bytes], weight: int, deadline_s: float) -> T:
        started_s = perf_counter()
        if started_s >= deadline_s:
            raise EngineTooLate
        decoded = self._decode(held[0])
        seconds = perf_counter() - started_s
        with self._lock:  # what was damaged does not come here: it weighed too much for what it took
            seconds = min(seconds, MOST_TIMES * self._predicted_s(weight))
            self._seconds = KEPT * self._seconds + seconds
            self._weight = KEPT * self._weight + weight
        return decoded

    def _predicted_s(self, weight: int) -> float:
        return weight * self._seconds / self._weight

    def _ended(self, held: list[bytes], weight: int) -> None:
        held.clear()
        with self._lock:
            self._n_submitted -= 1
            self._submitted_weight -= weight
