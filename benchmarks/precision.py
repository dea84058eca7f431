"""Compares int8 stages with float ones, stage by stage, in turns, on one thread.

    python -m benchmarks.precision --bundle models/zoo/cifar100-msdnet

A stage's time does not depend on the image's content, so the images are noise. The best of many runs counts. Keep the
machine otherwise idle.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.running import run
from models.bundle import Bundle, load_bundle
from service.runners.onnx import OnnxRunner


def stage_seconds(bundles: list[Bundle], n_rows: int, n_runs: int) -> list[list[float]]:
    """Best times in seconds [bundle][stage] for a batch of `n_rows`, with the bundles measured in turns."""
    runners = [OnnxRunner(bundle, n_rows, n_lanes=1) for bundle in bundles]
    best = [[float("inf")] * runner.n_stages for runner in runners]
    shape = bundles[0].manifest.stages[0].inputs[0].shape
    images = np.random.default_rng(0).integers(0, 256, (n_rows, *shape), dtype=np.uint8)
    for _ in range(n_runs):
        for times, runner in zip(best, runners, strict=True):
            rows = [runner.first_state(image) for image in images]
            for stage in range(runner.n_stages):
                started = time.perf_counter()
                rows = runner.run(stage, rows).states
                times[stage] = min(times[stage], time.perf_counter() - started)
    return best


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of a bundle with int8 stages.")] = Path(
        "models/zoo/cifar100-msdnet"
    ),
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; repeatable. By default, 1, 8 and 32.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each stage.")] = 20,
) -> None:
    """Measure the stages in both precisions, in milliseconds per image."""
    loaded = load_bundle(bundle)
    bundles = [loaded, loaded.at("int8")]
    for n_rows in rows or (1, 8, 32):
        fp32, int8 = stage_seconds(bundles, n_rows, runs)
        table = Table(title=f"{loaded.manifest.name}, batches of {n_rows}: ms per image", title_justify="left")
        for heading in ("stage", "fp32", "int8", "times as fast"):
            table.add_column(heading, justify="right")
        parts = [(str(number), a, b) for number, (a, b) in enumerate(zip(fp32, int8, strict=True), start=1)]
        for name, a, b in [*parts, ("all", sum(fp32), sum(int8))]:
            table.add_row(name, f"{1e3 * a / n_rows:.3f}", f"{1e3 * b / n_rows:.3f}", f"{a / b:.2f}")
        Console().print(table)


if __name__ == "__main__":
    run(main)
