"""The report of the GPU benchmark as Markdown, whether or not all of its parts have run."""

from collections.abc import Sequence
from typing import Any

ENGINE, WHOLE, AS_TORCH = "engine: ", "whole network, ", "the whole network by torch's own kernels"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write_up(report: dict[str, Any]) -> str:
    """The report as a page of Markdown tables."""
    title = "DRY RUN of the GPU benchmark: these numbers mean nothing" if report["dry"] else "The GPU engine"
    parts = [f"# {title}\n", f"Total time: {report['seconds']:.0f} s.\n"]
    for case in report["networks"]:
        found = case.get("found", {})
        parts += [_about(case, found), _failures(case), _rates(case, found), _alone(found)]
        parts += [*_onnx(found), *_compilers(found), _stages(found), _seconds(case)]
    return "\n".join(part for part in parts if part)


def _about(case: dict[str, Any], found: dict[str, Any]) -> str:
    lines = [f"## {case.get('name', case['network'])}\n"]
    if "device" in case:
        lines.append(
            f"{case['device']}, torch {case['torch']}, {case['dtype']}, {case['lanes']} lanes; {case['engine']}."
        )
    if case.get("device_at_end"):
        lines.append(f"At the end: {case['device_at_end']}.")
    if "peaks" in found:
        macs, copied = found["peaks"]
        lines.append(f"Matrix product {macs / 1e9:.0f} G multiply-adds/s, copy {copied / 1e9:.0f} GB/s.")
    if "full_mflops" in case:
        lines.append(f"{case['full_mflops']:.0f} M multiply-adds; {case['images']} {case['kind']}.")
    if "max_rows" in case:
        gib = f", {case['gib']:.1f} GiB of the device's memory" if "gib" in case else ""
        lines.append(f"Largest batch {case['max_rows']}{gib}.")
    if "answers" in found:
        lines.append(_answers(found["answers"]))
    return "\n".join(lines) + "\n"


def _answers(answers: dict[str, Any]) -> str:
    elsewhere = ", ".join(f"{same:.2%} at {budget}" for budget, same in answers["same_at_other_budgets"].items())
    return (
        f"Same label and exit as float32: {answers['same_label_and_exit']:.2%} at 40% budget ({answers['wanted']:.1%}: "
        f"{'met' if answers['met'] else 'NOT MET'}), {elsewhere}; close calls, with margins "
        f"within the error: {answers['close_calls']:.1%}; worst logit error "
        f"{answers['worst_logit_error_of_largest']:.1e} of the largest logit."
    )


def _failures(case: dict[str, Any]) -> str:
    lines = [f"* **Failed**, {part}: {why.strip().splitlines()[0]}\n" for part, why in case["failed"].items()]
    lines += [f"* **Not run**, {part}: {why}\n" for part, why in case.get("not_begun", {}).items()]
    return "".join(lines)


def _spread(row: dict[str, Any]) -> str:
    low, high = row["lowest_and_highest"]
    return f"{row['images_per_s']:.0f} ({low:.0f} to {high:.0f})"


def _rates(case: dict[str, Any], found: dict[str, Any]) -> str:
    wholes = [results for name, results in found.items() if name.startswith(WHOLE)]
    best = max((results["images_per_s"] for results in wholes), default=0.0)
    lines = [
        ["whole network, one graph, exits off", "-", "-", _spread(w), "", "", "", w["rows"], "", ""] for w in wholes
    ]
    if (plain := found.get(AS_TORCH)) is not None:
        times = f"{plain['images_per_s'] / best:.2f} x" if best else "-"
        lines.append([AS_TORCH, "-", "-", _spread(plain), times, "", "", plain["rows"], "", ""])
    engines = {name.removeprefix(ENGINE): results for name, results in found.items() if name.startswith(ENGINE)}
    engines |= {name: results["rates"] for name, results in found.get("onnx", {}).items() if "rates" in results}
    engines |= {"engine without a network": found.get("engine without a network", [])}
    for name, rows in engines.items():
        for row in rows:
            shares = ["-" if row[key] is None else f"{row[key]:.0%}" for key in ("share_of_ideal", "device_idle")]
            times = f"{row['images_per_s'] / best:.2f} x" if best else "-"
            rate = [f"{row['budget']:.0%}", f"{row['cost']:.0%}", _spread(row), times]
            ends = [f"{row['rows_a_batch']:.0f}", f"{row['median_ms']:.1f}", f"{row['host_us_an_image']:.0f}"]
            lines.append([name, *rate, *shares, *ends])
    head = ["engine", "budget", "cost", "images/s", "over best whole", "of ideal", "device idle", "rows", "median ms"]
    return _table([*head, "host us per image"], lines) if lines else ""


def _alone(found: dict[str, Any]) -> str:
    alone_ms = found.get("alone_ms", {})
    if not alone_ms:
        return ""
    return "One image alone, ms: " + ", ".join(f"{what} {ms:.2f}" for what, ms in alone_ms.items()) + ".\n"


def _onnx(found: dict[str, Any]) -> list[str]:
    parts = []
    for name, results in found.get("onnx", {}).items():
        if "skipped" in results:
            parts.append(f"Not measured, {name}: {results['skipped']}\n")
            continue
        graphs = "CUDA graphs" if results["graphs"] else "no CUDA graphs"
        parts.append(f"{name}, {graphs}. {_answers(results['answers'])} {_alone(results)}")
    return parts


def _compilers(found: dict[str, Any]) -> list[str]:
    parts = []
    for name, rows in found.items():
        if name.startswith("by "):
            lines = []
            for row in rows:
                then = row.get("failed") or f"{row['ms']:.3f}"
                lines.append([row["stage"], f"{row['plain_ms']:.3f}", then, f"{row['seconds_to_make']:.1f}"])
            parts.append(_table(["stage, full batches", "as served, ms", f"{name}, ms", "seconds to compile"], lines))
    return parts


def _stages(found: dict[str, Any]) -> str:
    lines = []
    for row in found.get("stages", []):
        times = [
            f"{row[key]:.3f}" if key in row else "-" for key in ("device_ms", "roofline_ms", "eager_ms", "call_ms")
        ]
        lines.append([row["stage"], row["rows"], *times, f"{row['share_of_roofline']:.0%}"])
    if not lines:
        return ""
    return _table(["stage", "rows", "graph ms", "roofline ms", "eager ms", "call ms", "of roofline"], lines)


def _seconds(case: dict[str, Any]) -> str:
    parts = [f"{part} {seconds:.0f}" for part, seconds in case.get("part_seconds", {}).items()]
    return f"Seconds: {', '.join(parts)}.\n" if parts else ""
