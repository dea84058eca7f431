"""The threads that decode large images: who waits, for how long, and what is held meanwhile."""

import weakref
from collections.abc import Iterator
from threading import Event
from time import perf_counter

import pytest

from service.decoding import Decoding
from service.errors import EngineOverloaded, EngineTooLate
from tests.waiting import LIMIT_S, wait_until


class Body(bytearray):
    """Of which a test can see that nobody holds it."""


@pytest.fixture
def stop() -> Iterator[Event]:
    event = Event()
    yield event
    event.set()


def test_who_would_wait_too_long_is_refused_and_others_are_not(stop: Event) -> None:
    def decode(body: bytes) -> int:
        if body.startswith(b"slow"):
            assert stop.wait(LIMIT_S)
        return len(body)

    decoding = Decoding(decode, 2, max_wait_s=0.5)
    decoding._seconds, decoding._bytes = 1.0, 1000.0  # as if a second a thousand bytes were its pace
    slow = [decoding.submit(b"slow".ljust(450)) for _ in range(2)]
    waiting = [decoding.submit(b"x" * n_bytes) for n_bytes in (100, 100)]  # 900 and 1,000 bytes are before these
    with pytest.raises(EngineOverloaded, match="4 images are in flight, which will take about") as caught:
        decoding.submit(b"x")
    assert caught.value.wait_s == pytest.approx(0.55)
    stop.set()
    assert [future.result(LIMIT_S) for future in (*slow, *waiting)] == [450, 450, 100, 100]
    wait_until("all are forgotten", lambda: decoding._n_submitted == decoding._submitted_bytes == 0)
    assert decoding.submit(b"x").result(LIMIT_S) == 1
    decoding.close()


def test_an_idle_thread_takes_whatever_comes(stop: Event) -> None:
    decoding = Decoding(len, 2, max_wait_s=0.0)
    decoding._seconds, decoding._bytes = 1.0, 1.0
    for _ in range(3):
        assert decoding.submit(b"x" * 1000).result(LIMIT_S) == 1000
        wait_until("it is forgotten", lambda: decoding._n_submitted == 0)
    decoding.close()


def test_the_pace_is_that_of_the_latest() -> None:
    decoding = Decoding(len, 1)
    for _ in range(50):
        decoding.submit(bytes(1_000_000)).result(LIMIT_S)
    assert 0 < decoding._seconds / decoding._bytes < 1e-6
    assert decoding._bytes == pytest.approx(1e7, rel=0.01)
    decoding.close()


def test_one_whose_deadline_passes_meanwhile_is_not_decoded(stop: Event) -> None:
    decoded: list[bytes] = []

    def decode(body: bytes) -> None:
        assert stop.wait(LIMIT_S)
        decoded.append(body)

    decoding = Decoding(decode, 1)
    first = decoding.submit(b"first")
    late = decoding.submit(b"late", perf_counter())
    stop.set()
    first.result(LIMIT_S)
    with pytest.raises(EngineTooLate):
        late.result(LIMIT_S)
    assert decoded == [b"first"]
    decoding.close()


def test_what_is_given_up_is_let_go_of_at_once(stop: Event) -> None:
    decoding = Decoding(lambda body: stop.wait(LIMIT_S), 1)
    first = decoding.submit(b"first")
    body = Body(1000)
    held = weakref.ref(body)
    given_up = decoding.submit(body)  # type: ignore[arg-type]
    del body
    assert held() is not None
    assert given_up.cancel()
    assert held() is None
    assert (decoding._n_submitted, decoding._submitted_bytes) == (1, 5)
    stop.set()
    assert first.result(LIMIT_S)
    decoding.close()
