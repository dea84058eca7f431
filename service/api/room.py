"""Refuses images there is no room for, before anything else is done: under overload most requests end here, and what a
refusal costs is missing from the answers."""

from time import monotonic

from starlette.types import Scope

from service.api.documents import engine_problem, outcome, overloaded
from service.api.problems import Problem
from service.api.state import State
from service.logs import NOTES

SAME_FOR_S = 0.02
CLASSIFYING = frozenset({"/classify", "/classify/stream", "/classify/batch"})


class Room:
    """Knows whether one more request with images may come in; counts those that may not."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._last: Problem | None = None
        self._last_until_s = 0.0

    def refusal(self, scope: Scope) -> Problem | None:
        """Why a request is refused at the gate; None where it is not (another call, or one the server cannot take)."""
        return self.problem() if _has_images(scope) and self.state.is_open else None

    def note(self, scope: Scope, problem: Problem) -> None:
        """Count a request that is refused at the gate, and have its line in the log say why."""
        if _has_images(scope):
            self.state.metrics.count(outcome(problem))
        if (notes := scope.get(NOTES)) is not None:
            notes["problem"] = problem.kind

    def problem(self) -> Problem | None:
        """Why no image is taken at the moment; None while they are.

        For a while it is one and the same, which has been written out already: how long the wait will be is known no
        better than that.
        """
        state = self.state
        is_full = state.lifecycle.requests_in_flight >= state.settings.max_in_flight
        if not is_full and state.engine.has_room:
            return None
        now_s = monotonic()
        if self._last is None or now_s >= self._last_until_s:
            why = f"{state.settings.max_in_flight} requests are in work"
            self._last = overloaded(why) if is_full else engine_problem(state.engine.overload())
            self._last_until_s = now_s + SAME_FOR_S
        return self._last


def _has_images(scope: Scope) -> bool:
    return scope["path"] in CLASSIFYING and scope["method"] == "POST"
