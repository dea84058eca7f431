"""Answers that arrive together are written together, none lost, and in order."""

from functools import partial

import pytest

from service.front.outbox import MOST_HELD, Outbox


def test_without_holding_answers_are_written_at_once() -> None:
    written: list[int] = []
    Outbox().put(partial(written.append, 1))
    assert written == [1]


def test_held_answers_are_written_in_order_and_only_a_few_wait() -> None:
    outbox, written = Outbox(), list[int]()
    n = 2 * MOST_HELD + 3
    with outbox:
        for i in range(n):
            outbox.put(partial(written.append, i))
            assert len(written) == (i + 1) // MOST_HELD * MOST_HELD
    assert written == list(range(n))
    outbox.put(partial(written.append, n))
    assert written[-1] == n


def test_a_failing_write_holds_back_no_other_answer(caplog: pytest.LogCaptureFixture) -> None:
    outbox, written = Outbox(), list[int]()

    def fail() -> None:
        raise RuntimeError("gone")

    def tell() -> None:
        with outbox:
            outbox.put(partial(written.append, 1))
            outbox.put(fail)
            outbox.put(partial(written.append, 2))
            fail()

    with pytest.raises(RuntimeError, match="gone"):
        tell()
    outbox.put(partial(written.append, 3))
    assert written == [1, 2, 3]
    assert "an answer could not be written" in caplog.text


def test_writing_an_answer_may_produce_another() -> None:
    """The client's next request may have arrived already, and may be refused as soon as it is parsed."""
    outbox, written = Outbox(), list[int]()

    def write() -> None:
        written.append(1)
        outbox.put(partial(written.append, 3))

    with outbox:
        outbox.put(write)
        outbox.put(partial(written.append, 2))
    assert sorted(written) == [1, 2, 3]
