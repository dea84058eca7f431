"""What was found, one JSON line for every server and round, so that a run that was cut short goes on where it was."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One server, one round, of one network; either `finding` (of `measurement.Finding`) or why there is none."""

    network: str
    images: str
    peer: str
    title: str
    round: int
    finding: dict[str, Any] | None
    skipped: str | None


class Records:
    """All lines of a file, which is appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.all = [Record(**json.loads(line)) for line in lines]

    def add(self, record: Record) -> None:
        self.all.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def has(self, network: str, peer: str, round_: int) -> bool:
        """Whether it was found; what was skipped is tried again."""
        return any((r.network, r.peer, r.round) == (network, peer, round_) and r.finding for r in self.all)

    def findings(self, network: str, peer: str) -> list[dict[str, Any]]:
        return [r.finding for r in self.all if (r.network, r.peer) == (network, peer) and r.finding is not None]

    def networks(self) -> list[str]:
        return list(dict.fromkeys(r.network for r in self.all))

    def peers(self, network: str) -> list[tuple[str, str]]:
        """Names and titles, in the order in which they were first measured."""
        return list(dict.fromkeys((r.peer, r.title) for r in self.all if r.network == network))

    def reason(self, network: str, peer: str) -> str:
        """Why a server has no finding."""
        return next((r.skipped for r in self.all if (r.network, r.peer) == (network, peer) and r.skipped), "not run")
