"""What workers and the engine's process tell each other, as bytes: structures of fixed size for what is said of every
image, a batch of them in one frame.

A request is known by a number that no other of its worker ever has; modulo the number of slots it is the slot that the
image lies in.

Numbers are doubles, so that an answer is the same as if it had never travelled.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from math import isnan, nan
from typing import get_args

from service.budget import Reason
from service.rows import (
    Answer,
    EngineDraining,
    EngineError,
    EngineLost,
    EngineOverloaded,
    EngineTooLate,
    EngineUnsound,
    Options,
    Step,
    Told,
)


class Kind(IntEnum):
    """Of a frame."""

    # to a worker
    STARTED = 1  # the engine takes images
    DRAIN = 2  # answer what was accepted, and end
    BROKEN = 3  # the engine has broken down, and why: end
    TOLD = 4  # answers and steps, in the order in which they came about
    FAILED = 5  # requests that ended without an answer
    RELEASED = 6  # abandoned requests: the engine has let go of their slots
    REPLY = 7  # to a call: its number, and a pickled value or exception
    # from a worker
    SERVING = 8  # it listens, and has heard that the engine takes images
    SUBMIT = 9
    ABANDON = 10
    TOOK = 12  # seconds that answers took, see `Engine.took`
    CALL = 11  # its number, and JSON: what worked on pictures from anywhere is never unpickled by the engine's process


NUMBER = struct.Struct("<Q")
SECONDS = struct.Struct("<d")
CALL_NUMBER = struct.Struct("<I")
SUBMISSION = struct.Struct("<QIHBxddd")  # number, and what `pack_submission` says
TOLD = struct.Struct("<QIHBxIIdddddd")  # number, class, exit, reason, batch rows, ranked; see `pack_told`
RANKED = struct.Struct("<Id")  # class, softmax output
FAILURE = struct.Struct("<QBxHId")  # number, class of the error, bytes of its message, in_flight_rows, wait_s

REASONS: tuple[Reason, ...] = get_args(Reason)
REASON_CODES = {reason: code for code, reason in enumerate(REASONS, start=1)}  # 0: a step
ERRORS: tuple[type[EngineError], ...] = (
    EngineError,
    EngineOverloaded,
    EngineTooLate,
    EngineUnsound,
    EngineLost,
    EngineDraining,
)
ERROR_CODES = {error: code for code, error in enumerate(ERRORS)}
MESSAGE_BYTES = 4096
PLAIN = Options()


def pack_submission(number: int, options: Options) -> bytes:
    return SUBMISSION.pack(
        number,
        options.top_k,
        options.exit or 0,
        options.steps,
        nan if options.min_confidence is None else options.min_confidence,
        options.max_mflops,
        options.deadline_s,
    )


def submissions(payload: bytes) -> Iterator[tuple[int, Options]]:
    """The numbers and options of a frame SUBMIT. A deadline is on the monotonic clock, which all processes share."""
    last_wishes: list[float] = []
    options = PLAIN
    for number, *wishes in SUBMISSION.iter_unpack(payload):
        if wishes != last_wishes:  # most wish for the same
            last_wishes = wishes
            top_k, exit_number, steps, min_confidence, max_mflops, deadline_s = wishes
            options = Options(
                top_k=top_k,
                exit=exit_number or None,
                min_confidence=None if isnan(min_confidence) else min_confidence,
                max_mflops=max_mflops,
                deadline_s=deadline_s,
                steps=bool(steps),
            )
        yield number, options


def pack_numbers(numbers: Iterable[int]) -> bytes:
    return b"".join(map(NUMBER.pack, numbers))


def numbers(payload: bytes) -> Iterator[int]:
    return (number for (number,) in NUMBER.iter_unpack(payload))


def pack_seconds(seconds: Iterable[float]) -> bytes:
    return b"".join(map(SECONDS.pack, seconds))


def seconds(payload: bytes) -> Iterator[float]:
    return (took for (took,) in SECONDS.iter_unpack(payload))


def pack_told(number: int, told: Answer | Step) -> bytes:
    ranked = b"".join([RANKED.pack(*pair) for pair in told.top_k])
    k = len(told.top_k)
    if isinstance(told, Step):
        values = (told.confidence, told.mflops, 0.0, 0.0, told.score, told.threshold)
        return TOLD.pack(number, told.class_id, told.exit, 0, 0, k, *values) + ranked
    values = (
        told.confidence,
        told.mflops,
        told.queue_ms,
        told.compute_ms,
        nan if told.score is None else told.score,
        nan if told.threshold is None else told.threshold,
    )
    code = REASON_CODES[told.reason]
    return TOLD.pack(number, told.class_id, told.exit, code, told.batch_rows, k, *values) + ranked


def told(payload: bytes, class_names: Sequence[str]) -> Iterator[tuple[int, Answer | Step]]:
    """The numbers, and what is said of them, of a frame TOLD."""
    at = 0
    while at < len(payload):
        number, class_id, exit_number, code, batch_rows, k, *values = TOLD.unpack_from(payload, at)
        at += TOLD.size
        ranked_end = at + k * RANKED.size
        top_k = tuple(RANKED.iter_unpack(payload[at:ranked_end]))
        at = ranked_end
        confidence, mflops, queue_ms, compute_ms, score, threshold = values
        label = class_names[class_id]
        if code == 0:
            yield number, Step(class_id, label, confidence, top_k, exit_number, mflops, score, threshold)
            continue
        yield (
            number,
            Answer(
                class_id,
                label,
                confidence,
                top_k,
                exit_number,
                REASONS[code - 1],
                mflops,
                queue_ms,
                compute_ms,
                batch_rows,
                # A threshold is never nan; it is where no steps were asked for.
                None if isnan(threshold) else score,
                None if isnan(threshold) else threshold,
            ),
        )


def pack_failure(number: int, error: EngineError) -> bytes:
    message = str(error).encode()[:MESSAGE_BYTES]
    in_flight_rows, wait_s = 0, 0.0
    if isinstance(error, EngineOverloaded):
        in_flight_rows, wait_s = error.in_flight_rows, error.wait_s
    return FAILURE.pack(number, ERROR_CODES.get(type(error), 0), len(message), in_flight_rows, wait_s) + message


def failures(payload: bytes) -> Iterator[tuple[int, EngineError]]:
    """The numbers and errors of a frame FAILED."""
    at = 0
    while at < len(payload):
        number, code, length, in_flight_rows, wait_s = FAILURE.unpack_from(payload, at)
        at += FAILURE.size
        message = payload[at : at + length].decode(errors="replace")
        at += length
        kind = ERRORS[code]
        if kind is EngineOverloaded:
            yield number, EngineOverloaded(in_flight_rows, wait_s)
        elif kind is EngineTooLate:
            yield number, EngineTooLate()
        else:
            yield number, kind(message)


def pack_outcomes(outcomes: Iterable[tuple[int, Told]]) -> tuple[bytes, bytes]:
    """What one batch of the engine's has brought: the payloads of TOLD and FAILED, which is to follow it."""
    answered, failed = [], []
    for number, outcome in outcomes:
        if isinstance(outcome, EngineError):
            failed.append(pack_failure(number, outcome))
        else:
            answered.append(pack_told(number, outcome))
    return b"".join(answered), b"".join(failed)


def is_last(told: Told) -> bool:
    """Whether nothing more comes of a request."""
    return not isinstance(told, Step)
