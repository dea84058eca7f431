"""Waiting for messages never exceeds the timeout, whatever state the queue was left in."""

import threading
from math import inf
from queue import Empty, SimpleQueue
from typing import cast

import pytest

from service.engine.inbox import next_message

LIMIT_S = 30.0


def left_open() -> "SimpleQueue[str]":
    """A queue whose last message was put during a wait, and taken without one."""
    inbox: SimpleQueue[str] = SimpleQueue()
    assert next_message(inbox, 0.0) is None
    inbox.put("a message")
    assert inbox.get() == "a message"
    return inbox


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 1e-9, 1e-6, 1e-3])
def test_no_wait_exceeds_its_timeout(timeout_s: float) -> None:
    inbox = left_open()
    waiting = threading.Thread(target=next_message, args=(inbox, timeout_s), daemon=True)
    waiting.start()
    waiting.join(LIMIT_S)
    assert not waiting.is_alive()


@pytest.mark.parametrize("timeout_s", [LIMIT_S, inf])
def test_a_message_that_comes_meanwhile_ends_the_wait(timeout_s: float) -> None:
    inbox = left_open()
    threading.Timer(0.05, inbox.put, ["at last"]).start()
    assert next_message(inbox, timeout_s) == "at last"
    inbox.put("at once")
    assert next_message(inbox, 0.0) == "at once"


class Slow:
    """`SimpleQueue` of Python 3.11 on a machine that takes this thread's core in every wait: whoever waits with a
    timeout, and finds the lock open though there is no message, has no time left when it begins anew."""

    def __init__(self) -> None:
        self.is_open = True  # the lock, which `put` opens and a call that finds no message closes

    def get_nowait(self) -> str:
        self.is_open = False
        raise Empty

    def get(self, timeout: float) -> str:
        assert not self.is_open, "it would wait for ever"
        raise Empty


def test_it_does_not_wait_if_the_wait_would_not_end() -> None:
    assert next_message(cast("SimpleQueue[str]", Slow()), 1e-3) is None
