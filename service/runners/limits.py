"""Limits the rows of a batch, per stage, when memory is short: fewer after each batch that ran out of it.

Plain Python: the engine's thread reports which batches ran and which failed.
"""

import logging
import re
from collections.abc import Iterator

logger = logging.getLogger(__name__)

# ONNX Runtime and CUDA have no exception type for this: only the message tells.
SAYS_OUT_OF_MEMORY = re.compile(r"out of memory|failed to allocate memory|bad.?alloc|alloc_failed", re.IGNORECASE)
RAISE_AFTER_BATCHES = 1_000


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory has run out."""
    return any(isinstance(e, MemoryError) or SAYS_OUT_OF_MEMORY.search(str(e)) is not None for e in _causes(error))


def words_of(error: BaseException) -> str:
    """The first line of an error's message: torch's further lines are advice for developers."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


class RowLimits:
    """The largest batch of each stage (from 0), `max_rows` at first.

    After a batch that ran out of memory, the limit is half of that batch's rows. After `RAISE_AFTER_BATCHES` batches at
    the limit it doubles again, as memory may have been short only for a while. If it still is, that costs one more
    failed batch, which is rerun row by row.
    """

    def __init__(self, n_stages: int, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows = [max_rows] * n_stages
        self._full_batches = [0] * n_stages  # since the limit was changed

    def limit(self, max_rows: int) -> None:
        """Allow no batch larger than `max_rows` from now on."""
        self.max_rows = min(self.max_rows, max_rows)
        self.rows = [min(n_rows, max_rows) for n_rows in self.rows]

    def ran(self, stage: int, n_rows: int) -> None:
        """Record a batch that ran."""
        if self.rows[stage] == self.max_rows or n_rows < self.rows[stage]:
            return
        self._full_batches[stage] += 1
        if self._full_batches[stage] == RAISE_AFTER_BATCHES:
            self._set(stage, min(self.max_rows, 2 * self.rows[stage]))
            logger.warning("stage %d is tried with batches of %d images again", stage + 1, self.rows[stage])

    def failed(self, stage: int, n_rows: int, error: BaseException | None) -> None:
        """Record a batch that failed."""
        if n_rows > 1 and is_out_of_memory(error):
            self._set(stage, min(self.rows[stage], n_rows // 2))
            logger.warning(
                "stage %d has too little memory for %d images at once: batches of %d from now on; lower "
                "--max-batch-rows or give the server more memory",
                stage + 1,
                n_rows,
                self.rows[stage],
            )

    def _set(self, stage: int, n_rows: int) -> None:
        self.rows[stage], self._full_batches[stage] = n_rows, 0
