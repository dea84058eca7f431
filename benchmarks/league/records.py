"""What was found, one JSON line for every server and round, so that a run that was cut short goes on where it was."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.errors import TrainingError


class MixedError(TrainingError):
    """What is to be measured does not go with what was; the message says why not, and what to do."""


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
    how: dict[str, Any] = field(default_factory=dict)  # it was measured, see `Records.require`; empty: not known


class Records:
    """All lines of a file, which is appended to. A last one that was being written when all ended is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.all = [Record(**json.loads(line)) for line in whole.splitlines()]

    def require(
        self, how: Mapping[str, Any], versions: Mapping[str, str], variants: Mapping[str, Sequence[str]]
    ) -> None:
        """Check that all was measured as what comes will be: rounds of another plan, or of another state of the
        sources or of a network, are not to be taken for rounds of this one.

        Args:
            how: it will be measured, as JSON keeps it.
            versions: of the networks, by name; those of others may be any.
            variants: settings of the service's further rows, by name, likewise.

        Raises:
            MixedError: it was not.
        """
        for record in self.all:
            was = record.how
            now = {
                **how,
                "version": versions.get(record.network, was.get("version")),
                "settings": variants.get(record.peer, was.get("settings")),
            }
            if was != now:
                told = ", ".join(
                    f"{name} {was.get(name)} and not {now[name]}" for name in now if was.get(name) != now[name]
                )
                raise MixedError(
                    f"{self.path}: {record.peer} on {record.network} was measured otherwise ({told}); give another "
                    "--folder, or remove this one"
                )

    def add(self, record: Record) -> None:
        self.all.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def has(self, network: str, peer: str, round_: int) -> bool:
        """Whether it was found; what was skipped is tried again."""
        return any((r.network, r.peer, r.round) == (network, peer, round_) and r.finding for r in self.all)

    def findings(self, network: str, peer: str) -> list[dict[str, Any]]:
        return [r.finding for r in self.all if (r.network, r.peer) == (network, peer) and r.finding is not None]

    def how(self, network: str, name: str) -> Any:
        """One of the circumstances under which a network was measured; None where it is not known."""
        return next(r.how.get(name) for r in self.all if r.network == network)

    def networks(self) -> list[str]:
        return list(dict.fromkeys(r.network for r in self.all))

    def peers(self, network: str) -> list[tuple[str, str]]:
        """Names and titles, in the order in which they were first measured."""
        return list(dict.fromkeys((r.peer, r.title) for r in self.all if r.network == network))

    def reason(self, network: str, peer: str) -> str:
        """Why a server has no finding."""
        return next((r.skipped for r in self.all if (r.network, r.peer) == (network, peer) and r.skipped), "not run")
