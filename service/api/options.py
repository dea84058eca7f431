"""Options in the query of a classification: their parsing and their OpenAPI description."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.api.queries import bad_parameter, integer, number, read_query
from service.engine.rows import Options

KNOWN = ("top_k", "exit", "min_confidence", "max_mflops", "deadline_ms")
DEFAULT_TOP_K = 5
MAX_DEADLINE_MS = 600_000.0


@dataclass(frozen=True, slots=True)
class Asked:
    """Options parsed from a query. The deadline is relative to the arrival of the whole body."""

    options: Options
    deadline_ms: float | None = None

    def at(self, now_s: float, steps: bool = False) -> Options:
        """The engine's options for a request whose whole body had arrived at `now_s` (`perf_counter`)."""
        if self.deadline_ms is None and not steps:
            return self.options
        deadline_s = math.inf if self.deadline_ms is None else now_s + self.deadline_ms / 1e3
        return replace(self.options, deadline_s=deadline_s, steps=steps)


class OptionReader:
    """Parses the query of a classification.

    Args:
        n_classes: number of classes of the network.
        exit_mflops: cumulative cost of leaving at each exit, in millions of multiply-adds.
    """

    def __init__(self, n_classes: int, exit_mflops: Sequence[float]) -> None:
        self.n_classes, self.n_exits = n_classes, len(exit_mflops)
        self.first_mflops = exit_mflops[0]
        self.default = Asked(Options(top_k=min(DEFAULT_TOP_K, n_classes)))

    def read(self, query_string: bytes) -> Asked:
        """Return the options in a query string.

        Raises:
            Problem: 422 if a parameter is unknown, repeated, out of range, or excluded by another.
        """
        if not query_string:
            return self.default
        query = read_query(query_string, KNOWN)
        if not query:
            return self.default
        if "exit" in query and "min_confidence" in query:
            raise bad_parameter("exit and min_confidence exclude each other: give one of them", KNOWN)

        def real(name: str, lowest: float, highest: float) -> float | None:
            return number(name, query[name], lowest, highest, KNOWN) if name in query else None

        def whole(name: str, highest: int) -> int | None:
            return integer(name, query[name], 1, highest, KNOWN) if name in query else None

        max_mflops = real("max_mflops", self.first_mflops, math.inf)
        options = Options(
            top_k=whole("top_k", self.n_classes) or self.default.options.top_k,
            exit=whole("exit", self.n_exits),
            min_confidence=real("min_confidence", 0.0, 1.0),
            max_mflops=math.inf if max_mflops is None else max_mflops,
        )
        return Asked(options, real("deadline_ms", 1.0, MAX_DEADLINE_MS))

    def parameters(self) -> list[dict[str, Any]]:
        """The OpenAPI description of the query parameters."""
        described: dict[str, tuple[str, dict[str, Any]]] = {
            "top_k": (
                "number of most probable classes to list",
                {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": self.n_classes,
                    "default": self.default.options.top_k,
                },
            ),
            "exit": (
                "answer at this exit, whatever its confidence (reason `pinned`); excludes `min_confidence`",
                {"type": "integer", "minimum": 1, "maximum": self.n_exits},
            ),
            "min_confidence": (
                "answer at the first exit with at least this confidence, in place of the server's thresholds",
                {"type": "number", "minimum": 0, "maximum": 1},
            ),
            "max_mflops": (
                "run no stage that would cost more than this in total (reason `budget`)",
                {"type": "number", "minimum": self.first_mflops},
            ),
            "deadline_ms": (
                "from the last byte of the body: answer by then with the best result so far (reason `deadline`)",
                {"type": "number", "minimum": 1, "maximum": MAX_DEADLINE_MS},
            ),
        }
        return [
            {"name": name, "in": "query", "required": False, "description": text, "schema": schema}
            for name, (text, schema) in described.items()
        ]
