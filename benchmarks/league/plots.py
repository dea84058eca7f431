"""Plots the results: bars of images/s within the latency limit, labelled with the accuracy."""

from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.league.records import Records

OURS, THEIRS = "#0b6e99", "#b8b8b8"


def plot(records: Records, path: Path) -> None:
    """Draw one panel per network into a PNG; servers without results are marked with a cross."""
    networks = records.networks()
    most = max(len(records.peers(network)) for network in networks)
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(7 * len(networks), 0.8 + 0.42 * most), squeeze=False, layout="constrained"
    )
    for axis, network in zip(axes[0], networks, strict=True):
        rates = {
            peer: [f["max_rate_per_s"] for f in records.findings(network, peer[0])] for peer in records.peers(network)
        }
        order = sorted(rates, key=lambda peer: median(rates[peer] or [-1]))
        widest = max((median(found) for found in rates.values() if found), default=1) or 1
        for row, (name, title) in enumerate(order):
            findings = records.findings(network, name)
            if not findings:
                axis.plot(0, row, "x", color="black")
                axis.text(0.02 * widest, row, "not measured", va="center", fontsize=8)
                continue
            found = rates[name, title]
            middle = median(found)
            spread = [[middle - min(found)], [max(found) - middle]]
            ours = "ExitServe" in title
            axis.barh(row, middle, xerr=spread, color=OURS if ours else THEIRS, capsize=3)
            known = [f["accuracy"] for f in findings if f["accuracy"] is not None]
            accuracy = f"{100 * median(known):.1f} %" if known else "accuracy unknown"
            axis.text(max(found) + 0.02 * widest, row, f"{middle:.0f}/s, {accuracy}", va="center", fontsize=8)
        axis.set_yticks(range(len(order)), [title.replace("**", "") for _, title in order])
        axis.set_xlim(0, 1.35 * widest)
        limit_ms, n_cores = records.how(network, "limit_ms"), records.how(network, "cores")
        axis.set_xlabel(f"images/s at p99 <= {limit_ms:g} ms, {n_cores} cores; top-1 of the answers beside each")
        images = next(r.images for r in records.all if r.network == network)
        axis.set_title(f"{network}: {images}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
