"""Batch times in seconds, by stage and rows: measured at warm-up and updated by every batch that runs.

Plain Python over numbers: no clock, no thread, no array. Stages are counted from 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MEMORY_BATCHES = 16  # a bucket's time is averaged over so many of its batches
MOST_AT_ONCE = 2.0  # a batch's time is clamped to the expected time, times or divided by this
FOLLOW_BATCHES = 4  # a bucket that did not occur among so many batches of its stage follows the others
HOST_BATCH_S = 0.0002  # CPU time to hand a batch over and take it back; measured: 0.16 to 0.18 ms (Zen 4)
FORGET_BATCHES = 64  # after so many batches of a stage without a copied row, its cost of copying decays


@dataclass(slots=True, eq=False)
class _Bucket:
    """Batches of similar size."""

    seconds: float  # average, converted to a full bucket
    n_batches: int = 1
    last: int = 0  # `_Stage.n_batches` at its last batch


@dataclass(slots=True, eq=False)
class _Stage:
    fixed_s: float
    row_s: float
    buckets: dict[int, _Bucket] = field(default_factory=dict)  # by rows, a power of two
    n_batches: int = 0
    copy_s: float = 0.0  # per row
    n_copies: int = 0
    last_copy: int = 0

    def seconds(self, n_rows: int) -> float:
        return self.fixed_s + self.row_s * n_rows


class CostTable:
    """Batch times t(stage, rows), and the time to copy a row into a batch.

    Each power of two of rows has a bucket; a batch counts in the next larger one. Averages run over the last batches of
    a bucket. One batch, however long it took, moves them by a few per cent only: a hiccup of the machine is forgotten,
    a lasting slowdown is believed after some thirty batches. Buckets that have not run lately follow those that have,
    since what slows a machine slows all sizes. A line fitted to the buckets of a stage separates the fixed cost of a
    batch from the cost per row.

    Memory: a few numbers for each stage and each power of two up to the largest batch.

    Args:
        stage_seconds: by batch rows, per stage, measured with nothing else running; at least one size per stage. 0 if
            unknown.
        host_batch_s: CPU time per batch outside its run, on the cores that lanes share with the engine's thread.
    """

    def __init__(self, stage_seconds: Sequence[Mapping[int, float]], host_batch_s: float = 0.0) -> None:
        self._host_batch_s = host_batch_s
        self._stages = []
        for by_rows in stage_seconds:
            stage = _Stage(*_fit(by_rows))
            for n_rows, seconds in by_rows.items() if stage.row_s or stage.fixed_s else ():
                stage.buckets[_bucket(n_rows)] = _Bucket(_at_bucket(stage, n_rows, seconds))
            self._stages.append(stage)

    def seconds(self, stage: int, n_rows: int) -> float:
        """Seconds of a batch whose rows are adjacent in memory."""
        known, size = self._stages[stage], _bucket(n_rows)
        bucket, line_s = known.buckets.get(size), known.seconds(n_rows)
        return line_s * bucket.seconds / known.seconds(size) if bucket and line_s else line_s

    def fixed_s(self, stage: int) -> float:
        """Fixed seconds of a batch, whatever its rows: in its run and on the host."""
        known = self._stages[stage]
        return known.fixed_s + self._host_batch_s if known.fixed_s or known.row_s else 0.0

    def copy_s(self, stage: int) -> float:
        """Further seconds of each row that must be copied into the batch; 0 until measured."""
        return self._stages[stage].copy_s

    def ran(self, stage: int, n_rows: int, seconds: float, copy_seconds: float = 0.0) -> None:
        """Record a batch that took `seconds`, including `copy_seconds` for copying its rows (0: none was copied)."""
        known = self._stages[stage]
        known.n_batches += 1
        if copy_seconds > 0:
            self._copied(known, copy_seconds / n_rows)
        elif known.n_batches - known.last_copy > FORGET_BATCHES:
            known.copy_s *= 1 - 1 / MEMORY_BATCHES  # else copying, once overestimated, would never be tried again
        size, sample = _bucket(n_rows), _at_bucket(known, n_rows, seconds - copy_seconds)
        bucket = known.buckets.get(size)
        if bucket is None:
            bucket = known.buckets[size] = _Bucket(known.seconds(size) or sample)
        bucket.last = known.n_batches
        bucket.n_batches = min(bucket.n_batches + 1, MEMORY_BATCHES)
        factor = _moved(bucket.seconds, sample, bucket.n_batches)
        bucket.seconds *= factor
        for other in known.buckets.values():
            if known.n_batches - other.last > FOLLOW_BATCHES:
                other.seconds *= factor
        known.fixed_s, known.row_s = _fit({rows: each.seconds for rows, each in known.buckets.items()})

    @staticmethod
    def _copied(known: _Stage, row_s: float) -> None:
        known.last_copy = known.n_batches
        known.n_copies = min(known.n_copies + 1, MEMORY_BATCHES)
        known.copy_s = known.copy_s * _moved(known.copy_s, row_s, known.n_copies) or row_s


def _bucket(n_rows: int) -> int:
    return 1 << (n_rows - 1).bit_length()


def _at_bucket(stage: _Stage, n_rows: int, seconds: float) -> float:
    """Convert the seconds of a batch of `n_rows` to those of a batch of its bucket's full size."""
    expected = stage.seconds(n_rows)
    return seconds * stage.seconds(_bucket(n_rows)) / expected if expected > 0 else seconds


def _moved(average: float, sample: float, n_samples: int) -> float:
    """The factor by which one clamped sample moves an average over `n_samples`."""
    ratio = sample / average if average > 0 else 1.0
    return 1 + (min(max(ratio, 1 / MOST_AT_ONCE), MOST_AT_ONCE) - 1) / n_samples


def _fit(seconds_by_rows: Mapping[int, float]) -> tuple[float, float]:
    """Fit t(rows) = fixed + per_row x rows, neither negative, by least squares of relative errors."""
    if min(seconds_by_rows.values()) < 1e-9:  # nothing runs in less than a nanosecond
        return 0.0, 0.0
    weight = rows = seconds = squares = products = 0.0
    for n_rows, took_s in seconds_by_rows.items():
        w = 1 / took_s**2
        weight += w
        rows += w * n_rows
        seconds += w * took_s
        squares += w * n_rows * n_rows
        products += w * n_rows * took_s
    spread = weight * squares - rows * rows
    through_origin_s = products / squares
    # If one size outweighs all others by far, rounding may leave no spread, as with a single size.
    has_spread = len(seconds_by_rows) > 1 and spread > 0
    per_row_s = (weight * products - rows * seconds) / spread if has_spread else through_origin_s
    per_row_s = min(max(per_row_s, 0.0), through_origin_s)
    return max(0.0, (seconds - per_row_s * rows) / weight), per_row_s
