"""Answers from what a batch has said of its rows: column by column, as a call for each row takes five times as long."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import Any

from service import wishes
from service.budget import Reason
from service.lanes import Batch, BatchResult
from service.rows import Answer, Head, Request

_make: Callable[[Iterable[Any]], Answer] = partial(tuple.__new__, Answer)  # by place


def answers_of(
    rows: list[Request],
    batch: Batch,
    result: BatchResult,
    leaving: list[int] | None,
    reasons: list[Reason],
    mflops: float,
    class_names: Sequence[str],
    now_s: float,
    with_steps: bool,
) -> list[Answer]:
    """Answers of rows that leave together, in their order.

    Args:
        leaving: which rows of the batch `rows` are; None: all.
        reasons: why, an entry each.
        mflops: that each is charged.
        with_steps: some of them may have asked for steps, and are told score and threshold of the exit once more.
    """
    classes, sure = result.classes, result.confidences
    if leaving is not None:
        classes, sure = [classes[i] for i in leaving], [sure[i] for i in leaving]
    best: Iterable[tuple[tuple[int, float], ...]] = zip(zip(classes, sure, strict=True))
    most = max([row.options.top_k for row in rows])
    if most > 1:
        logits = result.logits if leaving is None else result.logits[leaving]
        ranked = zip(rows, wishes.rank(logits, sure, most), strict=True)
        best = [best_of_row[: row.options.top_k] for row, best_of_row in ranked]
    heads = [row.head if row.options.steps else None for row in rows] if with_steps else None
    columns = (  # as `Answer` has them
        classes,
        [class_names[class_id] for class_id in classes],
        sure,
        best,
        repeat(batch.stage + 1),
        reasons,
        repeat(mflops),
        [(now_s - row.admitted_s - row.compute_s) * 1e3 for row in rows],
        [row.compute_s * 1e3 for row in rows],
        repeat(len(batch.rows)),
        repeat(None) if heads is None else [head and head.score for head in heads],
        repeat(None) if heads is None else [head and head.threshold for head in heads],
    )
    return list(map(_make, zip(*columns, strict=False)))


def late_answer(row: Request, head: Head, mflops: float, class_names: Sequence[str], now_s: float) -> Answer:
    """A row's answer from a head that it has passed, its deadline having come."""
    step = wishes.step(row, head, class_names)
    return Answer(
        class_id=step.class_id,
        label=step.label,
        confidence=step.confidence,
        top_k=step.top_k,
        exit=step.exit,
        reason="deadline",
        mflops=mflops,
        queue_ms=(now_s - row.admitted_s - row.compute_s) * 1e3,
        compute_ms=row.compute_s * 1e3,
        batch_rows=head.batch_rows,
        score=step.score if row.options.steps else None,
        threshold=step.threshold if row.options.steps else None,
    )
