"""What workers and the engine's process tell each other, as bytes: structures for what is said of each image, those of
a batch in one frame.

A request is known by a number that no other of its worker ever has; modulo the number of slots it is the slot that the
image lies in.

Numbers are doubles, so that an answer is the same as if it had never travelled.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from functools import cache
from itertools import chain
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
WISHES = struct.Struct("<IHHIHBxddd")  # how many requests have them, and what `pack_submissions` says
OWN_SIZE = (0, 0)  # a picture's height and width where they are the network's
TOLD = "QIHBxIIdddddd"  # number, class, exit, reason, batch rows, ranked; see `pack_told`
RANKED = "Id"  # class, softmax output
RANKED_AT = struct.calcsize("<QIHBxI")  # where it says how many there are
RANKED_N = struct.Struct("<I")
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


def pack_submissions(submitted: Sequence[tuple[int, Options, tuple[int, int]]]) -> bytes:
    """The payload of a frame SUBMIT: wishes and a size, and the numbers of the requests next to each other that have
    these.

    A deadline is on the monotonic clock, which all processes share.
    """
    parts: list[bytes] = []
    start = 0
    for end in range(1, len(submitted) + 1):
        _, options, size = submitted[start]
        if end < len(submitted) and submitted[end][1] is options and submitted[end][2] == size:
            continue
        wishes = WISHES.pack(
            end - start,
            *size,
            options.top_k,
            options.exit or 0,
            options.steps,
            nan if options.min_confidence is None else options.min_confidence,
            options.max_mflops,
            options.deadline_s,
        )
        parts += wishes, pack_numbers([number for number, _, _ in submitted[start:end]])
        start = end
    return b"".join(parts)


def submissions(payload: bytes) -> Iterator[tuple[Options, tuple[int, int], Sequence[int]]]:
    """The wishes and sizes in a frame SUBMIT, and the numbers of the requests that have them."""
    at = 0
    while at < len(payload):
        n, height_px, width_px, top_k, exit_number, steps, min_confidence, max_mflops, deadline_s = WISHES.unpack_from(
            payload, at
        )
        at += WISHES.size
        options = Options(
            top_k=top_k,
            exit=exit_number or None,
            min_confidence=None if isnan(min_confidence) else min_confidence,
            max_mflops=max_mflops,
            deadline_s=deadline_s,
            steps=bool(steps),
        )
        yield options, (height_px, width_px), numbers(payload[at : at + n * NUMBER.size])
        at += n * NUMBER.size


def pack_numbers(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def numbers(payload: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(payload) // NUMBER.size}Q", payload)


def pack_seconds(seconds: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(seconds)}d", *seconds)


def seconds(payload: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(payload) // SECONDS.size}d", payload)


@cache
def _told(n_ranked: int) -> struct.Struct:
    """What is said of one image, with so many classes ranked."""
    return struct.Struct("<" + TOLD + n_ranked * RANKED)


def pack_told(number: int, told: Answer | Step) -> bytes:
    top_k = told.top_k
    n_ranked = len(top_k)
    if isinstance(told, Step):
        queue_ms = compute_ms = 0.0
        code = batch_rows = 0
    else:
        queue_ms, compute_ms = told.queue_ms, told.compute_ms
        code, batch_rows = REASON_CODES[told.reason], told.batch_rows
    return _told(n_ranked).pack(
        number,
        told.class_id,
        told.exit,
        code,
        batch_rows,
        n_ranked,
        told.confidence,
        told.mflops,
        queue_ms,
        compute_ms,
        nan if told.score is None else told.score,
        nan if told.threshold is None else told.threshold,
        *chain.from_iterable(top_k),
    )


def told(payload: bytes, class_names: Sequence[str]) -> Iterator[tuple[int, Answer | Step]]:
    """The numbers, and what is said of them, of a frame TOLD."""
    at = 0
    while at < len(payload):
        structure = _told(RANKED_N.unpack_from(payload, at + RANKED_AT)[0])
        values = structure.unpack_from(payload, at)
        at += structure.size
        number, class_id, exit_number, code, batch_rows, _ = values[:6]
        confidence, mflops, queue_ms, compute_ms, score, threshold = values[6:12]
        label = class_names[class_id]
        top_k = tuple(zip(values[12::2], values[13::2], strict=True))
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
