"""Answers from what a batch has said of its rows."""

from collections.abc import Sequence

from service import wishes
from service.budget import Reason
from service.lanes import Batch, BatchResult
from service.rows import Answer, Head, Request


def answers_of(
    rows: list[Request],
    batch: Batch,
    result: BatchResult,
    leaving: list[int] | None,
    reasons: list[Reason],
    mflops: float,
    class_names: list[str],
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
    most = 1
    for row in rows:  # compiled, a loop in C; `max` is not
        if row.options.top_k > most:
            most = row.options.top_k
    ranked: list[tuple[tuple[int, float], ...]] = []
    if most > 1:
        logits = result.logits if leaving is None else result.logits[leaving]
        sure = result.confidences if leaving is None else [result.confidences[i] for i in leaving]
        ranked = wishes.rank(logits, sure, most)
    answers: list[Answer] = []
    exit_number, n_rows = batch.stage + 1, len(batch.rows)
    for i, row in enumerate(rows):
        place = i if leaving is None else leaving[i]
        class_id = result.classes[place]
        head = row.head if with_steps and row.options.steps else None
        answer = Answer(
            class_id,
            class_names[class_id],
            result.confidences[place],
            _others(ranked[i], class_id, row.options.top_k) if most > 1 else (),
            exit_number,
            reasons[i],
            mflops,
            (now_s - row.admitted_s - row.compute_s) * 1e3,
            row.compute_s * 1e3,
            n_rows,
            None if head is None else head.score,
            None if head is None else head.threshold,
        )
        answers.append(answer)
    return answers


def _others(ranked: tuple[tuple[int, float], ...], class_id: int, k: int) -> tuple[tuple[int, float], ...]:
    """The k - 1 best classes but `class_id`, which is the first of them unless two were equal."""
    if ranked[0][0] == class_id:
        return ranked[1:k]
    return tuple([one for one in ranked if one[0] != class_id][: k - 1])


def late_answer(row: Request, head: Head, mflops: float, class_names: Sequence[str], now_s: float) -> Answer:
    """A row's answer from a head that it has passed, its deadline having come."""
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
