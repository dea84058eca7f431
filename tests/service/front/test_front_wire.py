"""Messages between processes: nothing is lost, duplicated, swapped or rounded."""

import random
import socket
from math import inf
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.budget.controller import Reason
from service.engine.rows import Answer, Options, Step
from service.errors import EngineDraining, EngineError, EngineLost, EngineOverloaded, EngineTooLate, EngineUnsound
from service.front import wire
from service.front.channel import Channel, Frame
from service.front.memory import Layout, SharedMemory, picture_in

NAMES = [f"class {i}" for i in range(1000)]
NUMBERS = st.integers(0, 2**63)
SHARES = st.floats(0, 1)
SIZES = st.tuples(st.integers(1, 65535), st.integers(1, 65535))
REALS = st.floats(allow_nan=False)
RANKED = st.lists(st.tuples(st.integers(0, 999), SHARES), min_size=1, max_size=100).map(tuple)
ANSWERS = st.builds(
    lambda ranked, exit_number, reason, mflops, times, rows: Answer(
        ranked[0][0], NAMES[ranked[0][0]], ranked[0][1], ranked[1:], exit_number, reason, mflops, *times, rows
    ),
    RANKED,
    st.integers(1, 64),
    st.sampled_from(get_args(Reason)),
    REALS,
    st.tuples(REALS, REALS),
    st.integers(1, 4096),
)
STEPS = st.builds(
    lambda ranked, exit_number, mflops, score, threshold: Step(
        ranked[0][0], NAMES[ranked[0][0]], ranked[0][1], ranked, exit_number, mflops, score, threshold
    ),
    RANKED,
    st.integers(1, 64),
    REALS,
    REALS,
    REALS,
)
OPTIONS = st.builds(
    Options,
    top_k=st.integers(1, 1000),
    exit=st.none() | st.integers(1, 64),
    min_confidence=st.none() | SHARES,
    max_mflops=st.floats(0, inf),
    deadline_s=st.floats(0, inf),
    steps=st.booleans(),
)
ERRORS = [
    EngineError("a batch failed, Straße"),
    EngineOverloaded(1024, 1.25),
    EngineTooLate(),
    EngineUnsound("no stage can be run"),
    EngineLost("the device is lost"),
    EngineDraining("stopping"),
]


@given(
    st.lists(OPTIONS, min_size=1, max_size=3),
    st.lists(st.tuples(NUMBERS, st.integers(0, 2), st.just(wire.OWN_SIZE) | SIZES), max_size=20),
)
def test_options_arrive_unchanged(wishes: list[Options], asked: list[tuple[int, int, tuple[int, int]]]) -> None:
    sent = [(number, wishes[which % len(wishes)], size) for number, which, size in asked]
    arrived = list(wire.submissions(wire.pack_submissions(sent)))
    assert [(number, options, size) for options, size, numbers in arrived for number in numbers] == sent
    assert len(arrived) <= len(sent)  # options are sent once for consecutive requests
    if sent and len(wishes) == 1 and len({size for _, _, size in sent}) == 1:
        assert len(arrived) == 1


@given(st.lists(st.tuples(NUMBERS, ANSWERS | STEPS), max_size=5))
def test_answers_arrive_to_the_last_bit(sent: list[tuple[int, Answer | Step]]) -> None:
    assert wire.told(wire.pack_told(sent), NAMES) == sent


def test_an_answer_with_steps_keeps_its_score() -> None:
    answer = Answer(3, NAMES[3], 0.5, ((4, 0.25),), 2, "pinned", 12.5, 0.1, 0.2, 4, score=-inf, threshold=inf)
    assert wire.told(wire.pack_told([(7, answer)]), NAMES) == [(7, answer)]


def test_errors_arrive_with_their_type() -> None:
    for (number, arrived), (i, sent) in zip(
        wire.told(wire.pack_told(enumerate(ERRORS)), NAMES), enumerate(ERRORS), strict=True
    ):
        assert number == i
        assert type(arrived) is type(sent)
        assert str(arrived) == str(sent)
        assert isinstance(arrived, EngineError)
        assert arrived.__dict__ == sent.__dict__


def test_errors_and_answers_keep_their_order() -> None:
    answer = Answer(3, NAMES[3], 0.5, (), 2, "final", 12.5, 0.1, 0.2, 4)
    [first, (number, error)] = wire.told(wire.pack_told([(7, answer), (5, ERRORS[0])]), NAMES)
    assert first == (7, answer)
    assert (number, str(error)) == (5, str(ERRORS[0]))


def channels() -> tuple[Channel, Channel]:
    """Two ends of a connection with the kernel's smallest buffers."""
    pair = socket.socketpair()
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return Channel(pair[0]), Channel(pair[1])


@pytest.mark.parametrize("seed", range(3))
def test_frames_arrive_complete_and_in_order_for_any_buffer_size(seed: int) -> None:
    random_of = random.Random(seed)
    sizes = [random_of.choice((0, 1, 40, 5_000, 50_000)) for _ in range(100)]
    sent = [Frame(i % 256, random_of.randbytes(size)) for i, size in enumerate(sizes)]
    near, far = channels()
    received: list[Frame] = []
    waiting = list(sent)
    all_out = False
    while waiting or not all_out:
        if waiting and random_of.random() < 0.5:
            all_out = near.send(*waiting.pop(0))
        elif random_of.random() < 0.7:
            received += far.receive()
        else:
            all_out = near.flush()
    near.close()
    while not far.is_closed:
        received += far.receive()
    far.close()
    assert received == sent


def test_sending_never_blocks_and_reports_a_backlog() -> None:
    near, far = channels()
    assert near.send(1, b"small")
    results = [near.send(2, bytes(10_000)) for _ in range(20)]  # nobody reads
    assert not any(results[1:])
    received: list[Frame] = []
    while not near.flush():
        received += far.receive()
    while len(received) < 21:
        received += far.receive()
    assert [len(frame.payload) for frame in received] == [5, *[10_000] * 20]
    far.close()
    near.send(3, bytes(1_000_000))
    assert near.is_closed
    assert near.send(4, b"lost, without an error")
    near.close()


def test_workers_count_separately() -> None:
    layout = Layout(n_workers=3, n_slots=5, height_px=7, width_px=9, n_exits=4)
    near = SharedMemory.create(layout)
    far = SharedMemory(layout, near.descriptor)
    for worker in range(3):
        far.set_in_flight(worker, 10 + worker)
        far.set_connections(worker, 20 + worker)
        far.images(worker)[...] = 100 + worker
        far.tally(worker).count("answered")
        far.tally(worker).responded(4, 0.001 * worker)
    assert near.in_flight_rows == 33
    assert [near.in_flight_of(worker) for worker in range(3)] == [10, 11, 12]
    for worker in range(3):
        assert np.all(near.images(worker) == 100 + worker)
        assert near.tally(worker).read() == far.tally(worker).read()
        assert near.tally(worker).read()[0] == 1
    assert [near.least_connections_beside(worker) for worker in range(3)] == [21, 20, 20]
    far.set_connections(1, None)  # the receiver reads nothing
    assert [near.least_connections_beside(worker) for worker in range(3)] == [22, 20, 20]
    far.set_connections(2, None)
    assert near.least_connections_beside(0) is None
    larger = near.with_canvas(12)
    assert larger.slots(2).shape == (5, 3 * 12 * 12)
    assert larger.tally(2).read() == near.tally(2).read()
    for slot, height, width in ((0, 12, 12), (4, 3, 11)):
        picture_in(larger.slots(2)[slot], height, width)[...] = slot
    assert larger.slots(2)[4].sum() == 3 * 3 * 11 * 4
    assert not far.board.is_alive
    near.board.publish(True, "Störung " * 200, 12, 0.25)
    assert far.board.is_alive
    assert (far.board.trouble or "").startswith("Störung Störung")
    assert (far.board.room_rows, far.board.row_s) == (12, 0.25)
    near.board.publish(True, None, 12, 0.25)
    assert far.board.trouble is None
