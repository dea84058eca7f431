"""Builds answers from the result of a batch."""

from collections.abc import Sequence
from typing import Literal

from service.budget.controller import Reason
from service.engine import wishes
from service.engine.lanes import Batch, BatchResult
from service.engine.rows import Answer, Head, Request

Verdict = Reason | Literal[""] | None
"""Why a row leaves; None if it goes on, "" if it had already ended."""


def answers_of(
    batch: Batch,
    result: BatchResult,
    reasons: list[Verdict],
    mflops: float,
    class_names: list[str],
    now_s: float,
    with_steps: bool,
) -> tuple[list[Request], list[Answer]]:
    """Return the rows of a batch that leave, in order, and their answers.

    Args:
        reasons: one verdict per row of the batch.
        mflops: charged to each row.
        with_steps: rows may have asked for `steps`; the answers of those that have include score and threshold.
    """
    ranked = _ranked(batch, result, reasons)
    rows: list[Request] = []
    answers: list[Answer] = []
    exit_number, n_rows = batch.stage + 1, len(batch.rows)
    classes, confidences = result.classes, result.confidences
    for i, row in enumerate(batch.rows):
        reason = reasons[i]
        if reason is None or reason == "":
            continue
        class_id, compute_s = classes[i], row.compute_s
        head = row.head if with_steps and row.options.steps else None
        answer = Answer(
            class_id,
            class_names[class_id],
            confidences[i],
            _others(ranked[i], class_id, row.options.top_k) if ranked else (),
            exit_number,
            reason,
            mflops,
            (now_s - row.admitted_s - compute_s) * 1e3,
            compute_s * 1e3,
            n_rows,
            None if head is None else head.score,
            None if head is None else head.threshold,
        )
        rows.append(row)
        answers.append(answer)
    return rows, answers


def _ranked(batch: Batch, result: BatchResult, reasons: list[Verdict]) -> dict[int, tuple[tuple[int, float], ...]]:
    """The best classes by index of the rows that leave: the largest `top_k` of them each; empty if that is 1."""
    most = 1
    for i, row in enumerate(batch.rows):  # mypyc compiles a loop to C, but not `max`
        if reasons[i] and row.options.top_k > most:
            most = row.options.top_k
    if most == 1:
        return {}
    leaving = [i for i, reason in enumerate(reasons) if reason]
    best = wishes.rank(result.logits[leaving], [result.confidences[i] for i in leaving], most)
    return dict(zip(leaving, best, strict=True))


def _others(ranked: tuple[tuple[int, float], ...], class_id: int, k: int) -> tuple[tuple[int, float], ...]:
    """The k - 1 best classes other than `class_id`, which ranks first unless another class ties with it."""
    if ranked[0][0] == class_id:
        return ranked[1:k]
    return tuple([other for other in ranked if other[0] != class_id][: k - 1])


def late_answer(row: Request, head: Head, mflops: float, class_names: Sequence[str], now_s: float) -> Answer:
    """The answer from `head`, the last that a row has passed, when its deadline has come."""
    step = wishes.step(row, head, class_names)
    return Answer(
        class_id=step.class_id,
        label=step.label,
        confidence=step.confidence,
        others=step.top_k[1:],
        exit=step.exit,
        reason="deadline",
        mflops=mflops,
        queue_ms=(now_s - row.admitted_s - row.compute_s) * 1e3,
        compute_ms=row.compute_s * 1e3,
        batch_rows=head.batch_rows,
        score=step.score if row.options.steps else None,
        threshold=step.threshold if row.options.steps else None,
    )
