"""Waiting for messages: never longer than asked for, in whatever state the queue was left."""

import threading
from queue import SimpleQueue

import pytest

from service.inbox import next_message

LIMIT_S = 30.0


def left_open() -> "SimpleQueue[str]":
    """A queue of which the last message was put while somebody waited, and taken without a wait."""
    inbox: SimpleQueue[str] = SimpleQueue()
    assert next_message(inbox, 0.0) is None
    inbox.put("a message")
    assert inbox.get() == "a message"
    return inbox


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 1e-9, 1e-6, 1e-3])
def test_nobody_waits_longer_than_asked_for(timeout_s: float) -> None:
    inbox = left_open()
    waiting = threading.Thread(target=next_message, args=(inbox, timeout_s), daemon=True)
    waiting.start()
    waiting.join(LIMIT_S)
    assert not waiting.is_alive()


def test_a_message_that_comes_meanwhile_ends_the_wait() -> None:
    inbox = left_open()
    threading.Timer(0.05, inbox.put, ["at last"]).start()
    assert next_message(inbox, LIMIT_S) == "at last"
    inbox.put("at once")
    assert next_message(inbox, 0.0) == "at once"
