"""The cost of the engine's own threads: images/s with a network that takes no time, and the latency of one image alone.

    make compile
    python -m benchmarks.host

Needs no GPU: slots, buckets, lanes and copies are those of `torch-cuda`, on the host, and only the stages do nothing.
Python and what is compiled of it (`make compile`) are measured in turns, each in a process of its own.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.options import JsonPath
from benchmarks.processes import REPOSITORY
from service.compiled import compiled_sources

MEASURES = ("Python", "compiled")
N_IMAGES = 2048  # to run more through the network first takes longer than all that is measured


@dataclass(frozen=True)
class Measured:
    """One process, at 40 % budget."""

    images_per_s: float
    us_an_image: float  # of processor time, all threads and whoever submits the images
    alone_ms: float  # median of an image that has the engine to itself, at 40 % budget
    alone_whole_ms: float  # the same through all stages


def measure(**amounts: int) -> Measured:
    """Measure in this process; the plan's `amounts` are those of `benchmarks.gpu` but for these."""
    import torch

    from benchmarks.gpu_cases import NETWORKS, Plan
    from benchmarks.gpu_engines import idle_runner, measure_alone, measure_idle
    from service.runners.torch_cuda.device import Host

    network = NETWORKS["cifar"]
    plan = Plan(Host(), torch.float32, **{**network.amounts, **amounts})
    case = network.make(plan)
    runner = idle_runner(case, plan)
    [engine] = measure_idle(case, plan, runner)
    alone = measure_alone(case, runner, plan)
    return Measured(
        images_per_s=engine["images_per_s"],
        us_an_image=engine["host_us_an_image"],
        alone_ms=alone["at 40 %, p50"],
        alone_whole_ms=alone["whole network, p50"],
    )


def load_sources() -> None:
    """Have this process import the service's sources, whether they are compiled or not."""

    def sources_in(folder: str) -> FileFinder:
        if not Path(folder).is_relative_to(REPOSITORY / "service"):
            raise ImportError("left to Python")
        return FileFinder(folder, (SourceFileLoader, [".py"]))

    sys.path_hooks.insert(0, sources_in)
    sys.path_importer_cache.clear()
    for name in [name for name in sys.modules if name.startswith("service.")]:
        del sys.modules[name]  # it may have come compiled


def measure_apart(what: str, **amounts: int) -> Measured:
    command = [sys.executable, "-m", "benchmarks.host", "--one", what]
    command += [f"--{name.replace('_', '-')}={amount}" for name, amount in amounts.items()]
    told = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Measured(**json.loads(told.splitlines()[-1]))


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each.")] = 5,
    n_images: Annotated[int, typer.Option(min=1, help="Distinct images, sent repeatedly.")] = N_IMAGES,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Most rows in a batch; by default, as in `benchmarks.gpu`.")
    ] = None,
    in_flight: Annotated[
        int | None, typer.Option(min=1, help="Images in flight; by default, as in `benchmarks.gpu`.")
    ] = None,
    json_path: JsonPath = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the engine without a network, as Python and compiled."""
    given = {"n_images": n_images, "max_rows": max_rows, "in_flight": in_flight}
    amounts = {name: amount for name, amount in given.items() if amount is not None}
    if one is not None:
        if one == "Python":
            load_sources()
        print(json.dumps(asdict(measure(**amounts))))
        return
    kinds = MEASURES if compiled_sources() else MEASURES[:1]
    found: dict[str, list[Measured]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            found[kind].append(measure_apart(kind, **amounts))
    table = Table("", *kinds, title="The engine without a network, 32 px, 40 % budget: medians (lowest to highest)")
    for title, name, digits in (
        ("images/s", "images_per_s", 0),
        ("processor time an image, us", "us_an_image", 1),
        ("one image alone, p50 ms", "alone_ms", 2),
        ("the same, all stages", "alone_whole_ms", 2),
    ):
        cells = []
        for kind in kinds:
            values = [getattr(measured, name) for measured in found[kind]]
            cells.append(f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})")
        table.add_row(title, *cells)
    Console().print(table)
    if len(kinds) == 1:
        print("Nothing is compiled here: `make compile`, then this compares.")
    if json_path:
        json_path.write_text(json.dumps({kind: [asdict(measured) for measured in found[kind]] for kind in kinds}))


if __name__ == "__main__":
    typer.run(main)
