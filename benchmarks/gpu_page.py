"""The GPU benchmark's findings as a page of Markdown."""

from collections.abc import Sequence
from typing import Any


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write_up(report: dict[str, Any]) -> str:
    """The report as a page of Markdown tables."""
    parts = [
        f"# {report['title']}\n",
        f"{report['device']}, torch {report['torch']}, {report['dtype']}; {report['seconds']:.0f} s in all. "
        f"Matrix product {report['gmacs_per_s']:.0f} G multiply-adds/s, copy {report['gbytes_per_s']:.0f} GB/s.\n",
    ]
    for found in report["networks"]:
        parts += [_about(found), _rates(found), _alone(found["alone_ms"]), *_onnx(found), _stages(found)]
    return "\n".join(parts)


def _about(found: dict[str, Any]) -> str:
    answers = found["answers"]
    met = "met" if answers["same_label_and_exit"] >= answers["wanted"] else "NOT MET"
    others = answers["same_of_the_others"]
    clear = "-" if others is None else f"{others:.2%}"
    return (
        f"## {found['network']}\n\n{found['full_mflops']:.0f} M multiply-adds; {found['images']} SYNTHETIC images. "
        f"Same label and exit as float32: {answers['same_label_and_exit']:.2%} ({answers['wanted']:.1%}: {met}); "
        f"of those that are no close call ({1 - answers['close_calls']:.1%}): {clear}; worst logit error "
        f"{answers['worst_logit_error_of_largest']:.1e} of the largest logit.\n\n"
        f"Whole network, one graph, exits off: **{found['whole_network_images_per_s']:.0f} images/s**.\n"
    )


def _rates(found: dict[str, Any]) -> str:
    whole = found["whole_network_images_per_s"]
    lines = []
    onnx = {name: told["rates"] for name, told in found["onnx"].items() if "rates" in told}
    for name, rows in (found["engines"] | onnx).items():
        for row in rows:
            shares = [f"{row[key]:.0%}" for key in ("share_of_ideal", "device_idle")]
            speed = [f"{row['images_per_s']:.0f}", f"{row['images_per_s'] / whole:.2f} x"]
            budget = [f"{row['budget']:.0%}", f"{row['cost']:.0%}"]
            lines.append([name, *budget, *speed, *shares, f"{row['rows_a_batch']:.0f}", f"{row['median_ms']:.1f}"])
    head = ["engine", "budget", "cost", "images/s", "of whole", "of ideal", "device idle", "rows", "median ms"]
    return _table(head, lines)


def _alone(alone_ms: dict[str, float]) -> str:
    return "One image alone, ms: " + ", ".join(f"{what} {ms:.2f}" for what, ms in alone_ms.items()) + ".\n"


def _onnx(found: dict[str, Any]) -> list[str]:
    parts = []
    for name, told in found["onnx"].items():
        if "skipped" in told:
            parts.append(f"Not measured, {name}: {told['skipped']}\n")
            continue
        graphs = "CUDA graphs" if told["graphs"] else "no CUDA graphs"
        same = f"{told['answers']['same_label_and_exit']:.2%}"
        parts.append(f"{name}, {graphs}; same label and exit as float32: {same}. {_alone(told['alone_ms'])}")
    return parts


def _stages(found: dict[str, Any]) -> str:
    lines = []
    for row in found["stages"]:
        times = [f"{row[key]:.3f}" for key in ("device_ms", "roofline_ms", "eager_ms", "call_ms")]
        lines.append([row["stage"], row["rows"], *times, f"{row['share_of_roofline']:.0%}"])
    return _table(["stage", "rows", "graph ms", "roofline ms", "eager ms", "call ms", "of roofline"], lines)
