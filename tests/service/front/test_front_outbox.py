"""Answers told together are written together, none lost, none before its turn."""

from functools import partial

import pytest

from service.front.outbox import MOST_HELD, Outbox


def test_what_is_put_is_written_at_once_while_nothing_is_held() -> None:
    written: list[int] = []
    Outbox().put(partial(written.append, 1))
    assert written == [1]


def test_what_is_held_is_written_in_order_and_never_more_than_a_few_wait() -> None:
    outbox, written = Outbox(), list[int]()
    n = 2 * MOST_HELD + 3
    with outbox:
        for i in range(n):
            outbox.put(partial(written.append, i))
            assert len(written) == (i + 1) // MOST_HELD * MOST_HELD
    assert written == list(range(n))
    outbox.put(partial(written.append, n))
    assert written[-1] == n


def test_whoever_fails_holds_no_answer_back(caplog: pytest.LogCaptureFixture) -> None:
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


def test_an_answer_that_is_written_may_bring_another() -> None:
    """A client's next request may have come already, and be refused as soon as it is looked at."""
    outbox, written = Outbox(), list[int]()

    def write() -> None:
        written.append(1)
        outbox.put(partial(written.append, 3))

    with outbox:
        outbox.put(write)
        outbox.put(partial(written.append, 2))
    assert sorted(written) == [1, 2, 3]
