"""What workers and the engine's process tell each other, as bytes: what is said of the images of a batch is one frame.

To the engine's process go structures: it unpickles nothing from processes that have decoded pictures from anywhere. To
workers, who trust it, tuples of numbers are pickled, three fifths of the time of structures, and errors as they are.

A request is known by a number that no other of its worker ever has; modulo the number of slots it is the slot that the
image lies in.

Numbers are doubles, so that an answer is the same as if it had never travelled.
"""

import pickle
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from math import isnan, nan

from service.engine.rows import Answer, Options, Step, Told


class Kind(IntEnum):
    """Of a frame."""

    # to a worker
    STARTED = 1  # the engine takes images
    DRAIN = 2  # answer what was accepted, and end
    BROKEN = 3  # the engine has broken down, and why: end
    TOLD = 4  # answers, steps and errors, in the order in which they came about
    RELEASED = 5  # abandoned requests: the engine has let go of their slots
    REPLY = 6  # to a call: its number, and a pickled value or exception
    # from a worker
    SERVING = 7  # it listens, and has heard that the engine takes images
    SUBMIT = 8
    ABANDON = 9
    TOOK = 10  # seconds that answers took, see `Engine.took`
    CALL = 11  # its number, and JSON: what worked on pictures from anywhere is never unpickled by the engine's process


NUMBER = struct.Struct("<Q")
SECONDS = struct.Struct("<d")
CALL_NUMBER = struct.Struct("<I")
WISHES = struct.Struct("<IHHIHBxddd")  # how many requests have them, and what `pack_submissions` says
OWN_SIZE = (0, 0)  # a picture's height and width where they are the network's
STEP_FIELDS = 8  # of a step in TOLD; an answer has more, and an error two


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


def pack_told(told: Iterable[tuple[int, Told]]) -> bytes:
    """The payload of a frame TOLD: of an answer its fields in their order, but for the label; of a step fewer."""
    return pickle.dumps([_fields(number, said) for number, said in told], pickle.HIGHEST_PROTOCOL)


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
    """The numbers, and what is said of them, of a frame TOLD."""
    arrived: list[tuple[int, Told]] = []
    for fields in pickle.loads(payload):
        if len(fields) > STEP_FIELDS:
            # Named one by one, for they come by the thousand: to pass them on as a tuple takes a fifth longer.
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


def is_last(told: Told) -> bool:
    """Whether nothing more comes of a request."""
    return not isinstance(told, Step)
