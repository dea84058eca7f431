"""The threads that decode large images: which images wait, for how long, and what is kept meanwhile."""

import weakref
from collections.abc import Iterator
from threading import Event
from time import perf_counter, sleep

import pytest

from service.errors import EngineOverloaded, EngineTooLate
from service.images.threads import Decoding
from tests.waiting import LIMIT_S, wait_until


class Body(bytearray):
    """A body that supports weak references, so that a test can see when it is freed."""


@pytest.fixture
def stop() -> Iterator[Event]:
    event = Event()
    yield event
    event.set()


def test_images_that_would_wait_too_long_are_refused(stop: Event) -> None:
    def decode(body: bytes) -> int:
        if body.startswith(b"slow"):
            assert stop.wait(LIMIT_S)
        return len(body)

    decoding = Decoding(decode, 2, max_wait_s=0.5)
    decoding._seconds, decoding._weight = 1.0, 1000.0  # as if the pace were one second per thousand bytes
    slow = [decoding.submit(b"slow".ljust(450)) for _ in range(2)]
    waiting = [decoding.submit(b"x" * n_bytes) for n_bytes in (100, 100)]  # 900 and 1,000 bytes are ahead of these
    with pytest.raises(EngineOverloaded, match="4 images are in flight, which will take about") as caught:
        decoding.submit(b"x")
    assert caught.value.wait_s == pytest.approx(0.55)
    stop.set()
    assert [future.result(LIMIT_S) for future in (*slow, *waiting)] == [450, 450, 100, 100]
    wait_until("all are forgotten", lambda: decoding._n_submitted == decoding._submitted_weight == 0)
    assert decoding.submit(b"x").result(LIMIT_S) == 1
    decoding.close()


def test_an_idle_thread_accepts_any_image(stop: Event) -> None:
    def decode(body: bytes) -> int:
        if body == b"slow":
            assert stop.wait(LIMIT_S)
        return len(body)

    decoding = Decoding(decode, 2, max_wait_s=0.0)
    decoding._seconds, decoding._weight = 1.0, 1.0
    slow = decoding.submit(b"slow")
    for _ in range(3):  # on the other thread
        assert decoding.submit(b"x" * 1000).result(LIMIT_S) == 1000
        wait_until("it is forgotten", lambda: decoding._n_submitted == 1)
    stop.set()
    assert slow.result(LIMIT_S) == 4
    decoding.close()


def test_the_pace_follows_recent_images() -> None:
    decoding = Decoding(len, 1)
    for _ in range(50):
        decoding.submit(bytes(2_000_000)).result(LIMIT_S)
    assert 0 < decoding._seconds / decoding._weight < 1e-9
    assert decoding._weight == pytest.approx(2e7, rel=0.01)
    decoding.close()


def test_one_outlier_changes_the_pace_little_and_many_change_it() -> None:
    """An image may take a hundred times as long as others of its weight, like a JPEG in a hundred passes."""
    decoding = Decoding(lambda body: sleep(0.2) if body.startswith(b"odd") else None, 1)
    ordinary_s = decoding._predicted_s(1)
    odd = b"odd".ljust(100_000)
    decoding.submit(odd).result(LIMIT_S)
    assert ordinary_s < decoding._predicted_s(1) < 1.1 * ordinary_s
    decoding._weight, decoding._seconds = 1e5, 1e5 * ordinary_s  # as after others of the same weight
    for _ in range(8):
        decoding.submit(odd).result(LIMIT_S)
    assert decoding._predicted_s(len(odd)) > 0.1
    decoding.close()


def test_damaged_images_do_not_affect_the_pace() -> None:
    """Its header may claim any size, but decoding fails at once."""

    def refuse(body: bytes) -> None:
        raise ZeroDivisionError

    decoding = Decoding(refuse, 1, weigh=lambda body: 10**9)
    known = decoding._seconds, decoding._weight
    with pytest.raises(ZeroDivisionError):
        decoding.submit(b"x").result(LIMIT_S)
    assert (decoding._seconds, decoding._weight) == known
    decoding.close()


def test_an_image_whose_deadline_has_passed_is_not_decoded(stop: Event) -> None:
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


def test_abandoned_images_are_freed_at_once(stop: Event) -> None:
    decoding = Decoding(lambda body: stop.wait(LIMIT_S), 1)
    first = decoding.submit(b"first")
    body = Body(1000)
    held = weakref.ref(body)
    given_up = decoding.submit(body)  # type: ignore[arg-type]
    del body
    assert held() is not None
    assert given_up.cancel()
    assert held() is None
    assert (decoding._n_submitted, decoding._submitted_weight) == (1, 5)
    stop.set()
    assert first.result(LIMIT_S)
    decoding.close()
