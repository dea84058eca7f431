"""Refuses images there is no room for, before anything else is done: under overload most requests end here, and what a
refusal costs is missing from the answers."""

from starlette.types import Scope

from service.api.documents import engine_problem, outcome, overloaded
from service.api.problems import Problem
from service.api.state import State
from service.logs import NOTES
from service.rows import EngineError

CLASSIFYING = frozenset({"/classify", "/classify/stream", "/classify/batch"})


class Room:
    """Knows whether one more request with images may come in; counts those that may not."""

    def __init__(self, state: State) -> None:
        self.state = state

    def refusal(self, scope: Scope) -> Problem | None:
        """Why a request is refused at the gate; None where it is not (another call, or one the server cannot take)."""
        state = self.state
        if scope["path"] not in CLASSIFYING or scope["method"] != "POST" or not state.is_ready:
            return None
        if state.lifecycle.requests_in_flight >= state.settings.max_in_flight:
            problem = overloaded(f"{state.settings.max_in_flight} requests are in work")
        else:
            try:
                state.engine.require_room()
                return None
            except EngineError as error:
                problem = engine_problem(error)
        state.metrics.count(outcome(problem))
        if (notes := scope.get(NOTES)) is not None:
            notes["problem"] = problem.kind
        return problem
