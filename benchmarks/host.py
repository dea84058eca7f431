"""The host cost of the engine: images/s with a network that takes no time, and the latency of a single image.

    make compile
    python -m benchmarks.host

Needs no GPU: slots, buckets, lanes and copies are those of `torch-cuda`, on the host; only the stages do nothing.
The Python modules and the compiled ones (`make compile`) are measured in turns, each run in its own process.
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
N_IMAGES = 2048  # with more, preparing the case (the network runs on all images) would take longer than measuring


@dataclass(frozen=True)
class Measured:
    """Results of one process."""

    images_per_s: float  # at a 40 % budget
    us_an_image: float  # processor time of all threads, including the one that submits the images
    alone_ms: float  # median latency of a single image in an idle engine, at a 40 % budget
    alone_whole_ms: float  # the same through all stages


def measure(**amounts: int) -> Measured:
    """Measure in this process; `amounts` replace those of `benchmarks.gpu`'s plan."""
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
    """Make this process import the service's Python sources even where compiled modules exist."""

    def sources_in(folder: str) -> FileFinder:
        if not Path(folder).is_relative_to(REPOSITORY / "service"):
            raise ImportError("not in service/: left to the default finder")
        return FileFinder(folder, (SourceFileLoader, [".py"]))

    sys.path_hooks.insert(0, sources_in)
    sys.path_importer_cache.clear()
    for name in [name for name in sys.modules if name.startswith("service.")]:
        del sys.modules[name]  # may be a compiled module


def measure_apart(what: str, **amounts: int) -> Measured:
    command = [sys.executable, "-m", "benchmarks.host", "--one", what]
    command += [f"--{name.replace('_', '-')}={amount}" for name, amount in amounts.items()]
    output = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Measured(**json.loads(output.splitlines()[-1]))


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Processes per variant.")] = 5,
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
    """Measure the engine without a network: its Python modules and, if present, its compiled ones."""
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
        ("processor time per image, us", "us_an_image", 1),
        ("one image alone, p50, ms", "alone_ms", 2),
        ("the same, all stages", "alone_whole_ms", 2),
    ):
        cells = []
        for kind in kinds:
            values = [getattr(measured, name) for measured in found[kind]]
            cells.append(f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})")
        table.add_row(title, *cells)
    Console().print(table)
    if len(kinds) == 1:
        print("There are no compiled modules to compare with: run `make compile` first.")
    if json_path:
        json_path.write_text(json.dumps({kind: [asdict(measured) for measured in found[kind]] for kind in kinds}))


if __name__ == "__main__":
    typer.run(main)
