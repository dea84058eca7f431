"""Admission control ahead of all other work: under overload most requests end here, so a refusal must be cheap."""

from time import monotonic

from starlette.types import Scope

from service.api.documents import engine_problem, outcome, overloaded
from service.api.problems import Problem
from service.api.state import State
from service.logs import NOTES

SAME_FOR_S = 0.02
CLASSIFYING = frozenset({"/classify", "/classify/stream", "/classify/batch"})


class Room:
    """Decides whether another request with images is admitted; counts those refused at the gate."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._last: Problem | None = None
        self._last_until_s = 0.0

    def refusal(self, scope: Scope) -> Problem | None:
        """The overload problem for a request; None if there is room, it has no images, or the server is not open."""
        return self.problem() if _has_images(scope) and self.state.is_open else None

    def note(self, scope: Scope, problem: Problem) -> None:
        """Count a request refused at the gate, and note the problem for the access log."""
        if _has_images(scope):
            self.state.metrics.count(outcome(problem))
        if (notes := scope.get(NOTES)) is not None:
            notes["problem"] = problem.kind

    def problem(self) -> Problem | None:
        """The overload problem if no image is admitted at present, else None.

        The same object is returned for `SAME_FOR_S`, since its serialised form is cached, and the predicted wait is no
        more precise than that.
        """
        state = self.state
        is_full = state.lifecycle.requests_in_flight >= state.settings.max_in_flight
        if not is_full and state.engine.has_room:
            return None
        now_s = monotonic()
        if self._last is None or now_s >= self._last_until_s:
            why = f"{state.settings.max_in_flight:,} requests are in flight, as many as it takes"
            self._last = overloaded(why) if is_full else engine_problem(state.engine.overload())
            self._last_until_s = now_s + SAME_FOR_S
        return self._last


def _has_images(scope: Scope) -> bool:
    return scope["path"] in CLASSIFYING and scope["method"] == "POST"
