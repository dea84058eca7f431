"""Encodes the messages between workers and the engine's process; the outcomes of a batch are one frame per worker.

Messages to the engine's process are structs or JSON: it unpickles nothing from processes that have decoded untrusted
images. Workers trust the engine's process, so outcomes are pickled: errors as objects, the rest as tuples of numbers,
which takes three fifths of the time of structs.

A worker never reuses a request number. Modulo the number of slots, it is the number of the slot that holds the image.

Real numbers are sent as doubles, so that answers are the same as without workers.
"""

import pickle
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from math import isnan, nan

from service.engine.rows import Answer, Options, Step, Told


class Kind(IntEnum):
    """The kind of a frame."""

    # to a worker
    STARTED = 1  # the engine accepts images
    DRAIN = 2  # answer the requests accepted so far, and end
    BROKEN = 3  # the engine has broken down, with the reason: end
    TOLD = 4  # answers, steps and errors, in the order in which they occurred
    RELEASED = 5  # numbers of abandoned requests whose slots the engine has released
    REPLY = 6  # to a call: its number, and a pickled value or exception
    # from a worker
    SERVING = 7  # the worker is listening, and knows that the engine accepts images
    SUBMIT = 8
    ABANDON = 9
    TOOK = 10  # response times in seconds, see `Engine.took`
    CALL = 11  # its number, and its name and arguments as JSON


NUMBER = struct.Struct("<Q")
SECONDS = struct.Struct("<d")
CALL_NUMBER = struct.Struct("<I")
GROUP = struct.Struct("<IHHIHBxddd")  # number of requests, and the size and options that they share
OWN_SIZE = (0, 0)  # stands for the height and width of the network's input
STEP_FIELDS = 8  # number of fields of a step in TOLD; an answer has more, an error two


def pack_submissions(submitted: Sequence[tuple[int, Options, tuple[int, int]]]) -> bytes:
    """The payload of a frame SUBMIT: consecutive requests of one size and one `Options` form a group.

    Args:
        submitted: number, options (deadline on the shared monotonic clock) and (height, width) in pixels of each.
    """
    parts: list[bytes] = []
    start = 0
    for end in range(1, len(submitted) + 1):
        _, options, size = submitted[start]
        if end < len(submitted) and submitted[end][1] is options and submitted[end][2] == size:
            continue
        group = GROUP.pack(
            end - start,
            *size,
            options.top_k,
            options.exit or 0,
            options.steps,
            nan if options.min_confidence is None else options.min_confidence,
            options.max_mflops,
            options.deadline_s,
        )
        parts += group, pack_numbers([number for number, _, _ in submitted[start:end]])
        start = end
    return b"".join(parts)


def submissions(payload: bytes) -> Iterator[tuple[Options, tuple[int, int], Sequence[int]]]:
    """Yield the groups in a frame SUBMIT: their options, (height, width) in pixels, and request numbers."""
    at = 0
    while at < len(payload):
        n, height_px, width_px, top_k, exit_number, steps, min_confidence, max_mflops, deadline_s = GROUP.unpack_from(
            payload, at
        )
        at += GROUP.size
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


def pack_told(outcomes: Iterable[tuple[int, Told]]) -> bytes:
    """The payload of a frame TOLD: for each request its number, and the fields of its answer or step without label."""
    return pickle.dumps([_fields(number, outcome) for number, outcome in outcomes], pickle.HIGHEST_PROTOCOL)


def _fields(number: int, said: Told) -> tuple[object, ...]:
    if isinstance(said, Answer):
        return (
            number,
            said.class_id,
            said.confidence,
            said.others,
            said.exit,
            said.reason,
            said.mflops,
            said.queue_ms,
            said.compute_ms,
            said.batch_rows,
            said.score,
            said.threshold,
        )
    if isinstance(said, Step):
        return number, said.class_id, said.confidence, said.top_k, said.exit, said.mflops, said.score, said.threshold
    return number, said


def told(payload: bytes, class_names: Sequence[str]) -> list[tuple[int, Told]]:
    """The request numbers and outcomes in a frame TOLD."""
    arrived: list[tuple[int, Told]] = []
    for fields in pickle.loads(payload):
        if len(fields) > STEP_FIELDS:
            # Unpacked by name for speed: passing the tuple on (`*fields`) takes a fifth longer.
            number, class_id, share, others, exit_, reason, mflops, queue_ms, compute_ms, rows, score, threshold = (
                fields
            )
            label = class_names[class_id]
            answer = Answer(
                class_id, label, share, others, exit_, reason, mflops, queue_ms, compute_ms, rows, score, threshold
            )
            arrived.append((number, answer))
        elif len(fields) == STEP_FIELDS:
            number, class_id, *rest = fields
            arrived.append((number, Step(class_id, class_names[class_id], *rest)))
        else:
            arrived.append(fields)
    return arrived


def is_last(outcome: Told) -> bool:
    """Whether an outcome is the last one of its request."""
    return not isinstance(outcome, Step)
