"""Threads that decode large images; requests that would wait too long for them are refused at once.

Decoding is what clients can make most expensive, and the engine's own admission sees an image only afterwards. So the
wait for decoding has the same limit and the same refusal. Used from event loops.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from time import perf_counter
from typing import Generic, TypeVar

from service.errors import EngineOverloaded, EngineTooLate

T = TypeVar("T")
DECAY = 0.9  # of the measured pace, per decoding
INITIAL_S, INITIAL_WEIGHT = 0.15, 1e7  # the pace assumed at first, as an ordinary processor decodes photographs
MOST_TIMES = 4.0  # a decoding counts at most this multiple of its predicted time: outliers say little of the next


class Decoding(Generic[T]):
    """A thread pool that decodes files and limits the predicted wait.

    Args:
        decode: decodes one file.
        n_threads: number of threads.
        max_wait_s: longest wait, as predicted from the weight of the files ahead and the recent pace.
        weigh: estimates the work of decoding a file, in bytes of a photograph; has to be fast.
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
        self._lock = Lock()  # guards the attributes below
        self._n_submitted = self._submitted_weight = 0  # neither done nor cancelled
        self._seconds, self._weight = INITIAL_S, INITIAL_WEIGHT  # decaying sums over decodings

    def submit(self, body: bytes, deadline_s: float = math.inf) -> Future[T]:
        """Decode `body`. Cancelling the future releases it, unless a thread has begun.

        Args:
            deadline_s: in `perf_counter` time; the future fails with EngineTooLate if decoding begins later.

        Raises:
            EngineOverloaded: the predicted wait is too long.
            RuntimeError: no thread can be started.
        """
        weight = self._weigh(body)
        with self._lock:
            wait_s = self._predicted_s(self._submitted_weight) / self._n_threads
            if self._n_submitted >= self._n_threads and wait_s > self._max_wait_s:
                raise EngineOverloaded(self._n_submitted, wait_s)
            self._n_submitted += 1
            self._submitted_weight += weight
        held = [body]  # emptied on cancellation, as the pool's queue keeps cancelled items until their turn
        try:
            future = self._threads.submit(self._run, held, weight, deadline_s)
        except RuntimeError:  # no thread can be started: counted for ever, it would have later images refused
            self._ended(held, weight)
            raise
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
        with self._lock:  # not reached for damaged files, which take less than their weight suggests
            seconds = min(seconds, MOST_TIMES * self._predicted_s(weight))
            self._seconds = DECAY * self._seconds + seconds
            self._weight = DECAY * self._weight + weight
        return decoded

    def _predicted_s(self, weight: int) -> float:
        return weight * self._seconds / self._weight

    def _ended(self, held: list[bytes], weight: int) -> None:
        held.clear()
        with self._lock:
            self._n_submitted -= 1
            self._submitted_weight -= weight
