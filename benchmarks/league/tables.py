"""The results as Markdown tables for docs/benchmarks.md."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.league.records import Records

Finding = dict[str, Any]


def _spread(values: Sequence[float], form: str) -> str:
    """The median, and the range in brackets unless all values are printed alike."""
    middle, low, high = (format(value, form) for value in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _stop(findings: Sequence[Finding]) -> str:
    lost = max(f["lost_at_stop"] for f in findings)
    refused = max(f["refused_at_stop"] for f in findings)
    killed = any(f["stop_s"] is None for f in findings)
    return f"{lost}{f' ({refused} answered 503)' if refused else ''}{', had to be killed' if killed else ''}"


def _load(key: str) -> Callable[[Sequence[Finding]], str]:
    def cell(findings: Sequence[Finding]) -> str:
        values = [(f[key]["p50_ms"], f[key]["p99_ms"], f[key]["failures"]) for f in findings]
        failures = sum(failed for _, _, failed in values)
        latencies = f"{median(v[0] for v in values):.1f} / {median(v[1] for v in values):.1f}"
        return latencies + (f" ({failures} failed)" if failures else "")

    return cell


def _accuracy(findings: Sequence[Finding]) -> str:
    known = [f["accuracy"] for f in findings if f["accuracy"] is not None]
    return f"{100 * median(known):.1f}" if known else "unknown"


# `markdown` replaces the first heading, adding the latency limit.
COLUMNS: dict[str, Callable[[Sequence[Finding]], str]] = {
    "images/s": lambda fs: _spread([f["max_rate_per_s"] for f in fs], ".0f"),
    "top-1, %": _accuracy,
    "M multiply-adds per answer": lambda fs: f"{median(f['mmacs_per_answer'] for f in fs):.1f}",
    "p50 / p99 at 50 %, ms": _load("at_50"),
    "at 80 %, ms": _load("at_80"),
    "CPU, ms per image": lambda fs: _spread([f["cpu_ms_per_image"] for f in fs], ".2f"),
    "new request after hang-ups, ms": lambda fs: f"{median(f['after_hang_up_ms'] for f in fs):.0f}",
    "lost at SIGTERM (of 40)": _stop,
    "memory, MiB": lambda fs: f"{max(f['memory_mib'] for f in fs):.0f}",
    "start, s": lambda fs: f"{median(f['start_s'] for f in fs):.1f}",
}


def markdown(records: Records) -> str:
    """One table per network, fastest server first; servers without results are listed below it with the reason."""
    parts = []
    for network in records.networks():
        images = next(r.images for r in records.all if r.network == network)
        rounds = max(r.round for r in records.all if r.network == network)
        parts.append(f"`{network}`, {images}; medians of {rounds} rounds, lowest to highest in brackets:\n")
        limit = f"images/s at p99 <= {records.how(network, 'limit_ms'):g} ms"
        parts.append("| server | " + " | ".join([limit, *list(COLUMNS)[1:]]) + " |")
        parts.append("|---" * (1 + len(COLUMNS)) + "|")
        measured = {name: records.findings(network, name) for name, _ in records.peers(network)}
        order = sorted(
            records.peers(network),
            key=lambda peer: -median([f["max_rate_per_s"] for f in measured[peer[0]]] or [-1]),
        )
        for name, title in order:
            if measured[name]:
                cells = [column(measured[name]) for column in COLUMNS.values()]
                parts.append(f"| {title} | " + " | ".join(cells) + " |")
        parts.append("")
        for name, title in order:
            if not measured[name]:
                reason = " ".join(records.reason(network, name).split())
                parts.append(f"* {title} could not be measured: {reason[:300]}")
        parts.extend(_ratios(records, network))
        parts.append("")
    return "\n".join(parts)


def _ratios(records: Records, network: str) -> list[str]:
    """Ratios of this service's rate to the others', within rounds, since the machine's speed varies between them."""
    ours = {r.round: r.finding for r in records.all if (r.network, r.peer) == (network, "exitserve") and r.finding}
    lines = []
    for name, title in records.peers(network):
        theirs = {r.round: r.finding for r in records.all if (r.network, r.peer) == (network, name) and r.finding}
        ratios = [
            ours[k]["max_rate_per_s"] / theirs[k]["max_rate_per_s"]
            for k in sorted(ours.keys() & theirs.keys())
            if theirs[k]["max_rate_per_s"]
        ]
        if ratios and name != "exitserve":
            lines.append(f"{title} {_spread(ratios, '.2f')}")
    return [f"* ExitServe's images/s divided by the others', within rounds: {'; '.join(lines)}."] if lines else []
