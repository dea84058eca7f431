"""Blocking calls from a worker to the engine's process, for metrics and the budget; both ends of them.

Requests are JSON, because the engine's process must not unpickle data from processes that decode untrusted images;
replies are pickled. Calls are rare: images are submitted by other messages (`proxy.py`).
"""

import json
import logging
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from itertools import count
from typing import Any

from service.api.ports import KeeperPort, MetricsPort
from service.budget.state import BudgetState
from service.budget.target import Target
from service.errors import EngineDraining, EngineError
from service.front import wire
from service.front.wire import Kind
from service.tally import Tally

logger = logging.getLogger(__name__)

CALL_S = 30.0  # an engine's process that takes longer has hung


class Calls:
    """Makes blocking calls to the engine's process, on any thread but the event loop's."""

    def __init__(self, send: Callable[[Kind, bytes], None]) -> None:
        self._send = send
        self._numbers = count()
        self._waiting: dict[int, Future[Any]] = {}
        self._closed = False

    def ask(self, name: str, **arguments: Any) -> Any:
        """Return the result of the call `name`, or raise its exception; EngineError if no reply comes."""
        number, future = next(self._numbers), Future[Any]()
        self._waiting[number] = future
        try:
            if self._closed:
                raise gone()
            self._send(Kind.CALL, wire.CALL_NUMBER.pack(number) + json.dumps([name, arguments]).encode())
            return future.result(CALL_S)
        except TimeoutError:
            raise EngineError(f"the engine's process has not answered for {CALL_S:g} s") from None
        finally:
            self._waiting.pop(number, None)

    def take_reply(self, payload: bytes) -> None:
        (number,) = wire.CALL_NUMBER.unpack_from(payload)
        value = pickle.loads(payload[wire.CALL_NUMBER.size :])
        future = self._waiting.pop(number, None)
        if future is None:
            return
        if isinstance(value, Exception):
            future.set_exception(value)
        else:
            future.set_result(value)

    def close(self) -> None:
        """Fail pending and later calls: the engine's process no longer answers."""
        self._closed = True
        while self._waiting:
            self._waiting.popitem()[1].set_exception(gone())


class RemoteMetrics:
    """Counts in shared memory; the engine's process writes the exposition. See `service.api.ports.MetricsPort`."""

    def __init__(self, tally: Tally, calls: Calls) -> None:
        self.count, self.decoded, self.responded = tally.count, tally.decoded, tally.responded
        self._calls = calls

    def exposition(self, is_ready: bool) -> tuple[bytes, str]:
        content, content_type = self._calls.ask("exposition", is_ready=is_ready)
        return content, content_type


class RemoteKeeper:
    """The keeper of the budget, in the engine's process. See `service.api.ports.KeeperPort`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def read(self) -> tuple[Target, BudgetState]:
        target, state = self._calls.ask("read_budget")
        return target, state

    def set(self, target: Target) -> BudgetState:
        state: BudgetState = self._calls.ask("set_budget", **asdict(target))
        return state


def gone() -> EngineDraining:
    """The error for requests and calls whose engine's process has ended."""
    return EngineDraining("the engine's process has ended")


# --- the engine's process ---------------------------------------------------------------------------------------


def reply_to(payload: bytes, metrics: MetricsPort, keeper: KeeperPort) -> bytes:
    """Return the payload of a REPLY frame for that of a CALL frame: the pickled result or exception."""
    value: Any
    try:
        name, arguments = json.loads(payload[wire.CALL_NUMBER.size :])
        value = _call(metrics, keeper, name, arguments)
    except Exception as error:
        logger.exception("a worker's call failed")
        value = error
    return payload[: wire.CALL_NUMBER.size] + pickle.dumps(value)


def _call(metrics: MetricsPort, keeper: KeeperPort, name: str, arguments: dict[str, Any]) -> Any:
    if name == "exposition":
        return metrics.exposition(**arguments)
    if name == "read_budget":
        return keeper.read()
    if name == "set_budget":
        return keeper.set(Target(**arguments))
    raise ValueError(f"no such call: {name}")
