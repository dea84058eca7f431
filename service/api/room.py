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
        if scope["path"] not in CLASSIFYING or scope["method"] != "POST" or not self.state.is_ready:
            return None
        problem = self.problem()
        if problem is not None:
            self.state.metrics.count(outcome(problem))
            if (notes := scope.get(NOTES)) is not None:
                notes["problem"] = problem.kind
        return problem

    def problem(self) -> Problem | None:
        """Why no image is taken at the moment; None while they are."""
        limit = self.state.settings.max_in_flight
        if self.state.lifecycle.requests_in_flight >= limit:
            return overloaded(f"{limit} requests are in work")
        try:
            self.state.engine.require_room()
        except EngineError as error:
            return engine_problem(error)
        return None
