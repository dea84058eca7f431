"""The fast path for `POST /classify` with a raw, fully received image as its body, handled without an ASGI task.

Plain callbacks on the event loop: body -> decode -> submit -> outcome -> response bytes. An ASGI task, its futures and
the framework's layers cost several times as much. The protocol (`protocol.py`) decides which requests take this path;
all others go through the application, which shares the same steps (`classify.Classifier`).
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.api.access_log import log_request
from service.api.classify import Classifier
from service.api.documents import engine_problem, image_problem, outcome
from service.api.lifecycle import Names
from service.api.options import Asked
from service.api.problems import CLIENT_LEFT, Problem, internal_error, not_ready
from service.api.room import Room
from service.engine.rows import Answer, Told
from service.errors import EngineError
from service.images.decoder import ImageError

logger = logging.getLogger(__name__)

PATH = "/classify"
# Longest stretch of decoding between two turns of the sockets: a burst must not delay its first answers.
TURN_S = 0.002

JSON = b"content-type: application/json\r\n"

Respond = Callable[["Visit", int, bytes, bytes], None]  # visit, status, header fields specific to it, body


class Visit:
    """One request, from its head to its response. Used by the desk only, on the event loop only."""

    __slots__ = (
        "asked",
        "client",
        "decoded_s",
        "decoding",
        "ended",
        "entered_s",
        "notes",
        "request",
        "request_id",
        "respond",
        "started_s",
        "traceparent",
    )

    def __init__(self, client: str | None, respond: Respond, request_id: str, traceparent: str | None) -> None:
        self.client, self.respond = client, respond
        self.request_id, self.traceparent = request_id, traceparent
        self.asked: Asked
        self.entered_s = self.started_s = self.decoded_s = 0.0  # when its head, body and pixels were available
        self.decoding: asyncio.Future[NDArray[np.uint8]] | None = None  # on another thread
        self.request: Any = None  # the engine's, once submitted
        self.notes: dict[str, object] | None = None  # fields for its access log line; None without one
        self.ended = False


class Desk:
    """Answers visits; counts and logs how each ended.

    Args:
        classifier: reads options and builds answers.

    Attributes:
        room: admission check, made before the body is read.
        names: assigns request ids.
        has_log: whether to write an access log line for each visit.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.state = classifier, classifier.state
        self.room, self.names = Room(self.state), Names()
        self.has_log = self.state.settings.access_log == "json"
        self.lifecycle = self.state.lifecycle
        self._engine = self.state.engine
        self._decoder = self.state.decoder
        self._sink = self._hand_over  # one object: the engine groups outcomes by it
        self._bodies: deque[tuple[Visit, bytes]] = deque()
        self.limit_bytes = self.state.settings.max_body_bytes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0

    @property
    def is_open(self) -> bool:
        """False where requests must go through the application, which explains why they are refused."""
        return self.state.is_open

    def enter(self, headers: Mapping[bytes, bytes], query: bytes, client: str | None, respond: Respond) -> Visit:
        """Begin a visit once the request's head has arrived. It may be refused here; its body is then ignored."""
        visit = Visit(client, respond, *self.names.read(headers))
        if self.has_log:
            visit.entered_s, visit.notes = perf_counter(), {}
        problem = self.room.problem()
        if problem is None:
            try:
                visit.asked = self.classifier.options.read(query)
                return visit
            except Problem as error:
                problem = error
        self._refuse(visit, problem)
        return visit

    def take(self, visit: Visit, body: bytes) -> None:
        """Queue a visit for decoding: its whole body has arrived."""
        self.lifecycle.requests_in_flight += 1
        visit.started_s = perf_counter()
        if not self._bodies:
            if self._loop is None:
                self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
            self._loop.call_soon(self._work)
        self._bodies.append((visit, body))

    def leave(self, visit: Visit) -> None:
        """The client of a visit whose body had arrived has disconnected: its image runs no further stage."""
        if visit.ended:
            return
        visit.ended = True
        self.lifecycle.requests_in_flight -= 1
        self._give_up(visit)
        self.state.metrics.count("abandoned")
        self._log(visit, CLIENT_LEFT, 0)

    def cut_off(self, visit: Visit) -> None:
        """Answer 503: the drain timeout has passed before this visit, whose body had arrived, was answered."""
        if not visit.ended:
            self._give_up(visit)
            self._end(visit, not_ready(self.lifecycle.detail))

    def _give_up(self, visit: Visit) -> None:
        if visit.decoding is not None:
            visit.decoding.cancel()
        if visit.request is not None:
            self._engine.abandon(visit.request)

    # --- its steps ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Decode the bodies received in this turn of the event loop, and wake the engine once for all of them."""
        until_s = perf_counter() + TURN_S
        try:
            while self._bodies:
                visit, body = self._bodies.popleft()
                if not visit.ended:
                    self._step(visit, self._decode, body)
                if self._bodies and perf_counter() >= until_s:
                    break
        finally:  # even if reporting a failure raised: nothing else would process the remaining bodies
            if self._bodies:
                assert self._loop is not None
                self._loop.call_soon(self._work)
            self._engine.flush()

    def _step(self, visit: Visit, step: Callable[[Visit, Any], None], argument: Any) -> None:
        try:
            step(visit, argument)
        except ImageError as error:
            self._end(visit, image_problem(error))
        except EngineError as error:
            self._end(visit, engine_problem(error))
        except Exception:
            logger.exception("request %s failed", visit.request_id)
            if not visit.ended:
                self._end(visit, internal_error(visit.request_id))

    def _decode(self, visit: Visit, body: bytes) -> None:
        pixels = self._decoder.decode_here(body)
        if pixels is None:
            deadline_s = visit.asked.at(visit.started_s).deadline_s
            visit.decoding = asyncio.wrap_future(self._decoder.decode_elsewhere(body, deadline_s))
            visit.decoding.add_done_callback(partial(self._decoded_elsewhere, visit))
        else:
            self._submit(visit, pixels)

    def _decoded_elsewhere(self, visit: Visit, decoding: asyncio.Future[NDArray[np.uint8]]) -> None:
        visit.decoding = None  # it holds the pixels, and the visit may live long
        if not visit.ended:
            self._step(visit, self._take_decoded, decoding)
            self._engine.flush()

    def _take_decoded(self, visit: Visit, decoding: asyncio.Future[NDArray[np.uint8]]) -> None:
        pixels = decoding.result()
        self._decoder.observe_seconds(perf_counter() - visit.started_s)
        self._submit(visit, pixels)

    def _submit(self, visit: Visit, pixels: NDArray[np.uint8]) -> None:
        visit.decoded_s = perf_counter()
        options = visit.asked.at(visit.started_s)
        visit.request = self._engine.submit_to(self._sink, visit, pixels, options, flush=False)

    def _hand_over(self, outcomes: list[tuple[Visit, Told]]) -> None:
        """The engine's sink. Called on its thread, or on the event loop where the engine runs in another process."""
        if threading.get_ident() == self._loop_thread:
            self._tell(outcomes)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._tell, outcomes)

    def _tell(self, outcomes: list[tuple[Visit, Told]]) -> None:
        for visit, told in outcomes:
            if not visit.ended:
                self._step(visit, self._answer, told)

    def _answer(self, visit: Visit, told: Told) -> None:
        if isinstance(told, EngineError):
            self._end(visit, engine_problem(told))  # raising it would create a reference cycle with this frame
            return
        assert isinstance(told, Answer)
        document = self.classifier.answered(told, visit.started_s, visit.decoded_s, visit.request_id, visit.notes)
        self._end(visit, orjson.dumps(document))

    # --- ends ---------------------------------------------------------------------------------------------------

    def _end(self, visit: Visit, result: bytes | Problem) -> None:
        self.lifecycle.requests_in_flight -= 1
        if isinstance(result, Problem):
            self._refuse(visit, result)
            return
        visit.ended = True
        self.state.metrics.count("answered")
        visit.respond(visit, 200, JSON, result)
        self._log(visit, 200, len(result))

    def _refuse(self, visit: Visit, problem: Problem) -> None:
        visit.ended = True
        self.state.metrics.count(outcome(problem))
        if visit.notes is not None:
            visit.notes["problem"] = problem.kind
        fields, body = problem.write(PATH, visit.request_id)
        visit.respond(visit, problem.status, fields, body)
        self._log(visit, problem.status, len(body))

    def _log(self, visit: Visit, status: int, n_bytes: int) -> None:
        if visit.notes is not None:
            log_request(
                visit.request_id,
                visit.traceparent,
                visit.client,
                "POST",
                PATH,
                status,
                n_bytes,
                visit.entered_s,
                visit.notes,
            )
