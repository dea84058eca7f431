"""Results, one JSON line per server and round, so that an interrupted run can be resumed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.errors import TrainingError


class MixedError(TrainingError):
    """New results would not be comparable with those in the file; the message says why, and what to do."""


@dataclass(frozen=True)
class Record:
    """One server in one round on one network: `finding` (see `measurement.Finding`), or `skipped`, the reason."""

    network: str
    images: str
    peer: str
    title: str
    round: int
    finding: dict[str, Any] | None
    skipped: str | None
    how: dict[str, Any] = field(default_factory=dict)  # circumstances, see `Records.require`; empty: unknown


class Records:
    """The lines of a file that is appended to. An incomplete last line, of an interrupted write, is removed."""

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
        """Check that all records were measured with this plan, on these sources and networks, as others would not be
        comparable.

        Args:
            how: plan and circumstances of this run, in JSON types.
            versions: of the networks, by name; other networks' records are not checked for it.
            variants: settings of this service's additional rows, by name; likewise.

        Raises:
            MixedError: a record differs.
        """
        for record in self.all:
            was = record.how
            now = {
                **how,
                "version": versions.get(record.network, was.get("version")),
                "settings": variants.get(record.peer, was.get("settings")),
            }
            if was != now:
                differences = ", ".join(
                    f"{name} {was.get(name)}, now {now[name]}" for name in now if was.get(name) != now[name]
                )
                raise MixedError(
                    f"{self.path}: {record.peer} on {record.network} was measured under other conditions "
                    f"({differences}); give another --folder, or remove this one"
                )

    def add(self, record: Record) -> None:
        self.all.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def has(self, network: str, peer: str, round_: int) -> bool:
        """Whether there is a finding; a skipped server is tried again."""
        return any((r.network, r.peer, r.round) == (network, peer, round_) and r.finding for r in self.all)

    def findings(self, network: str, peer: str) -> list[dict[str, Any]]:
        return [r.finding for r in self.all if (r.network, r.peer) == (network, peer) and r.finding is not None]

    def how(self, network: str, name: str) -> Any:
        """One of the circumstances under which a network was measured; None if not recorded."""
        return next(r.how.get(name) for r in self.all if r.network == network)

    def networks(self) -> list[str]:
        return list(dict.fromkeys(r.network for r in self.all))

    def peers(self, network: str) -> list[tuple[str, str]]:
        """Names and titles, in order of first measurement."""
        return list(dict.fromkeys((r.peer, r.title) for r in self.all if r.network == network))

    def reason(self, network: str, peer: str) -> str:
        """Why a server has no finding."""
        return next((r.skipped for r in self.all if (r.network, r.peer) == (network, peer) and r.skipped), "not run")
