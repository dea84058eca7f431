"""Builds the JSON documents of answers and steps, and the problems for errors, without pydantic for speed."""

import math
from typing import Any

from starlette.requests import ClientDisconnect

from models.manifest import Manifest
from service.api.problems import Problem, not_ready
from service.engine.rows import Answer, Step
from service.errors import EngineDraining, EngineError, EngineLost, EngineOverloaded, EngineTooLate, EngineUnsound
from service.images.decoder import ImageError
from service.tally import Outcome

TITLES = {
    "empty-image": "Empty body",
    "not-an-image": "Not an image",
    "broken-image": "Broken image",
    "image-too-large": "Image too large",
    "animated-image": "Animated image",
}
STATUSES = {"image-too-large": 413, "animated-image": 415}  # the others are 400


class Documents:
    """Builds the documents described by `answers.Classification` and `answers.Step`, for one network."""

    def __init__(self, manifest: Manifest) -> None:
        self.class_names = manifest.class_names
        self.n_exits = len(manifest.exits)
        self.fixed = {
            "exits": self.n_exits,
            "full_mflops": manifest.exits[-1].executed_mflops,
            "model": manifest.name,
            "version": manifest.version,
        }

    def answer(self, answer: Answer, decode_s: float, total_s: float, request_id: str) -> dict[str, Any]:
        return {
            "label": answer.label,
            "class_id": answer.class_id,
            "confidence": rounded(answer.confidence),
            "top_k": self._ranked(answer.top_k),
            "exit": answer.exit,
            "reason": answer.reason,
            "mflops": answer.mflops,
            **self.fixed,
            "timings": {
                "decode_ms": int(decode_s * 1e6 + 0.5) / 1e3,  # to microseconds; as in `rounded`
                "queue_ms": int(answer.queue_ms * 1e3 + 0.5) / 1e3,
                "stages_ms": int(answer.compute_ms * 1e3 + 0.5) / 1e3,
                "total_ms": int(total_s * 1e6 + 0.5) / 1e3,
            },
            "request_id": request_id,
        }

    def step(self, step: Step) -> dict[str, Any]:
        return {
            "exit": step.exit,
            "exits": self.n_exits,
            "label": step.label,
            "class_id": step.class_id,
            "confidence": rounded(step.confidence),
            "top_k": self._ranked(step.top_k),
            "score": finite(step.score),
            "threshold": finite(step.threshold),
            "mflops": step.mflops,
            "final": False,
        }

    def _ranked(self, top_k: tuple[tuple[int, float], ...]) -> list[dict[str, Any]]:
        names = self.class_names
        return [{"label": names[i], "class_id": i, "confidence": rounded(share)} for i, share in top_k]


def rounded(share: float) -> float:
    """A share rounded to six places; `round` is slower, since it goes through a decimal string."""
    return int(share * 1e6 + 0.5) / 1e6 if share >= 0 else share  # NaN stays NaN


def finite(value: float | None) -> float | None:
    """The value, or None if it is not finite: JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def image_problem(error: ImageError) -> Problem:
    return Problem(STATUSES.get(error.kind, 400), error.kind, TITLES[error.kind], str(error))


def engine_problem(error: EngineError) -> Problem:
    if isinstance(error, EngineOverloaded):
        return overloaded(str(error), error.wait_s)
    if isinstance(error, EngineTooLate):
        return Problem(
            504,
            "deadline-passed",
            "Deadline passed",
            f"No answer: {error}. Send a longer deadline_ms, or try again when the server is less busy.",
        )
    if isinstance(error, EngineUnsound):
        return not_ready(f"No answer: {error}. The server retries by itself: try again later.")
    if isinstance(error, EngineLost):
        return not_ready(f"No answer: {error}. The server stops, and works again after a restart.")
    if isinstance(error, EngineDraining):
        return not_ready(f"The request was not accepted: {error}. Use another server.")
    return Problem(
        500,
        "engine-error",
        "Engine error",
        f"The image could not be classified: {error}. Try again; the server's log may say more.",
    )


def overloaded(why: str, wait_s: float = 1.0) -> Problem:
    """A 429 whose Retry-After is the predicted wait."""
    return _again_later(
        f"{why}. Send it again after the time in Retry-After, or raise --max-queue-s or --max-in-flight.", wait_s
    )


def too_many_bytes(limit_bytes: int) -> Problem:
    """A 429 for want of memory for request bodies."""
    return _again_later(
        f"it holds at most {limit_bytes:,} bytes of request bodies. Send it again later, or raise --max-held-bytes."
    )


def _again_later(why: str, wait_s: float = 1.0) -> Problem:
    return Problem(
        429,
        "overloaded",
        "Overloaded",
        f"The server is overloaded: {why}",
        headers={"Retry-After": str(max(1, math.ceil(wait_s)))},
        retry_after_s=round(max(wait_s, 0.01), 3),
    )


def outcome(error: Exception) -> Outcome:
    """The metrics outcome of a request that ended in an error."""
    if isinstance(error, ClientDisconnect):
        return "abandoned"
    status = error.status if isinstance(error, Problem) else 500
    if status in (429, 504):
        return "overloaded"
    if status == 503:
        return "unavailable"
    return "invalid" if status < 500 else "failed"
