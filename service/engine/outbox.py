"""Steps and outcomes that leave the engine's thread, grouped by the sink that receives them."""

import logging
from collections.abc import Sequence
from typing import Any

from service.engine.rows import ENDED, Answer, Request, Sink, Step, Told
from service.errors import EngineError

logger = logging.getLogger(__name__)

Outbox = dict[Sink, list[tuple[Any, Told]]]


def deliver(outbox: Outbox) -> None:
    """Pass every sink its steps and outcomes, and empty the outbox."""
    for sink, outcomes in outbox.items():
        try:
            sink(outcomes)
        except Exception:  # a failing sink must not stop the engine
            logger.exception("%d outcomes could not be delivered", len(outcomes))
    outbox.clear()


def turn_away(outbox: Outbox, requests: Sequence[Request], error: EngineError) -> int:
    """End those requests that have not ended yet, with `error`; returns how many. Abandoned ones get no outcome."""
    waiting = [request for request in requests if request.state is not ENDED]
    for request in waiting:
        request.state = ENDED
        if not request.abandoned:
            outbox.setdefault(request.sink, []).append((request.token, error))
    return len(waiting)


def resolve(outcomes: list[tuple[Any, Told]]) -> None:
    """The sink whose tokens are futures. Steps are ignored: a future takes one outcome."""
    for future, outcome in outcomes:
        if isinstance(outcome, Step) or not future.set_running_or_notify_cancel():
            continue
        if isinstance(outcome, Answer):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
