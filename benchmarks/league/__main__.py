"""`python -m benchmarks.league --data cifar-100-python.tar.gz --data imagenette`: see `main`."""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.league import environment
from benchmarks.league.graph import write_whole_graph
from benchmarks.league.measurement import Measurement, PeerError, Plan
from benchmarks.league.peers.serving import Setup
from benchmarks.league.pictures import Pictures, read_pictures
from benchmarks.league.plots import plot
from benchmarks.league.records import Record, Records
from benchmarks.league.roster import Peer, Places, roster
from benchmarks.league.tables import markdown
from benchmarks.running import run
from models.bundle import Bundle, load_bundle
from service.runners.onnx import default_lanes
from training.image_set import DataError
from training.sources import commit

ZOO = Path(__file__).resolve().parents[2] / "models" / "zoo"
BUNDLES = [ZOO / "cifar100-msdnet", ZOO / "imagenette-msdnet"]
INT8 = {"exitserve-int8": ["--precision", "int8"]}  # an extra row for bundles with int8 stages
QUICK = {"rounds": 2, "seconds": 3.0, "points": 5}
THOROUGH = {"rounds": 5, "seconds": 10.0, "points": 8}


class Network:
    """A bundle, prepared for all servers."""

    def __init__(self, bundle: Bundle, pictures: Pictures, places: Places, variants: dict[str, list[str]]) -> None:
        self.bundle, self.pictures, self.places, self.variants = bundle, pictures, places, variants
        self.name, self.peers = bundle.manifest.name, roster(places.n_exits, variants)


def prepare(
    path: Path, data: list[Path], python: Path, folder: Path, port: int, fraction: float, variants: dict[str, list[str]]
) -> Network:
    """Write the network's whole graph and choose the settings with which all servers serve it."""
    bundle = load_bundle(path)
    size = bundle.manifest.input
    graph = folder / f"{bundle.manifest.name}.onnx"
    write_whole_graph(bundle, graph)
    small = size.width_px <= 64
    setup = Setup(
        bundle=str(path.resolve()),
        graph=str(graph),
        port=port,
        height_px=size.height_px,
        width_px=size.width_px,
        n_workers=default_lanes(),
        # At 224 px one image keeps a core busy: a larger batch would only cost latency.
        max_rows=32 if small else 8,
        wait_ms=2.0,
        budget_fraction=fraction,
    )
    n_exits = len(bundle.manifest.exits)
    if bundle.manifest.int8 is not None:
        variants = {**INT8, **variants}
    return Network(bundle, read_pictures(bundle, data, 1000), Places(python, setup, n_exits), variants)


def why_not(peer: Peer, python: Path) -> str | None:
    """Why a peer cannot be measured; None if it can."""
    return next((why for package in peer.imports if (why := environment.missing(python, package)) is not None), None)


def known_settings() -> set[str]:
    """The options of the service, from its `--help` text."""
    shown = subprocess.run([sys.executable, "-m", "service", "--help"], capture_output=True, text=True).stdout
    return set(re.findall(r"--[a-z0-9-]+", shown))


def read_variants(given: list[str]) -> dict[str, list[str]]:
    """Parse NAME=SETTINGS into settings by name; typer.BadParameter if malformed or a setting does not exist."""
    variants, known = {}, known_settings() if given else set()
    for text in given:
        name, separator, settings = text.partition("=")
        words = shlex.split(settings)
        if not separator or not name or not words:
            raise typer.BadParameter(f"{text!r}: write NAME=SETTINGS, as in 'batches=--max-batch-rows 16'")
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                raise typer.BadParameter(f"{text!r}: the service has no setting {option}")
        variants[name] = words
    return variants


def one_round(
    network: Network, peer: Peer, round_: int, records: Records, plan: Plan, how: dict[str, Any], logs: Path
) -> None:
    """Measure one server once and append the result to the records."""
    reason = why_not(peer, network.places.python)
    finding = None
    started_s = time.monotonic()
    if reason is None:
        earlier = [f["max_rate_per_s"] for f in records.findings(network.name, peer.name) if f["max_rate_per_s"]]
        measurement = Measurement(peer, network.places, network.pictures, network.bundle.costs_mflops[-1], plan)
        try:
            log = logs / f"{network.name}-{peer.name}-{round_}.log"
            finding = measurement.run(log, median(earlier) if earlier else None).as_dict()
        except PeerError as error:
            reason = str(error)
    images = network.pictures.description
    how = {**how, "version": network.bundle.manifest.version, "settings": network.variants.get(peer.name)}
    records.add(Record(network.name, images, peer.name, peer.title, round_, finding, reason, how))
    outcome = f"{finding['max_rate_per_s']:.0f} images/s" if finding is not None else f"skipped: {reason}"
    print(f"{network.name} round {round_} {peer.name}: {outcome} [{time.monotonic() - started_s:.0f} s]", flush=True)


def main(
    bundle: Annotated[list[Path] | None, typer.Option(help="Bundle; repeatable. By default, those that ship.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Image set, as for training; repeatable. Each bundle uses the one with its classes."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="2 rounds of 3 s per rate instead of 5 of 10 s.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; each measures every server once.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.2, help="Seconds per run at one rate.")] = None,
    points: Annotated[int | None, typer.Option(min=1, help="Most rates to try in the search for the highest.")] = None,
    warm_up: Annotated[float, typer.Option(min=0.0, help="Seconds of load before measuring.")] = 2.0,
    limit_ms: Annotated[float, typer.Option(help="Limit for the 99th percentile of latency, in ms.")] = 100.0,
    fraction: Annotated[
        float, typer.Option(help="This service's budget, as a fraction of the full network's cost.")
    ] = 0.4,
    only: Annotated[list[str] | None, typer.Option(help="Measure only this server; repeatable.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Another row for this service, as NAME=SETTINGS, e.g. 'small=--max-batch-rows 8'; repeatable."
        ),
    ] = None,
    python: Annotated[Path | None, typer.Option(help="Python interpreter with the other servers' packages.")] = None,
    venv: Annotated[Path, typer.Option(help="Otherwise: folder to install them in.")] = Path("build/league-venv"),
    folder: Annotated[Path, typer.Option(help="Folder for results, logs and the plot.")] = Path("build/league"),
    output: Annotated[Path | None, typer.Option(help="Also write the Markdown tables to this file.")] = None,
    port: Annotated[int, typer.Option(help="First port to use.")] = 8570,
) -> None:
    """Measure this service and servers in common use, in turns, on the same network, images and cores.

    Each result is appended to FOLDER/results.jsonl, so the same command resumes an interrupted run. Another plan,
    network or commit needs another folder. Keep the machine idle meanwhile.
    """
    preset = QUICK if quick else THOROUGH
    plan = Plan(
        seconds=seconds or preset["seconds"],
        warm_up_s=warm_up,
        limit_ms=limit_ms,
        max_points=points or int(preset["points"]),
        resolution=1.04,
    )
    variants = read_variants(variant or [])
    manifests = [load_bundle(path, verify=False).manifest for path in bundle or BUNDLES]  # before the long install
    for path in data or []:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give CIFAR-100's tar.gz or folder, or an image folder")
    folder.mkdir(parents=True, exist_ok=True)
    records = Records(folder / "results.jsonl")
    how = {**asdict(plan), "fraction": fraction, "data": [path.name for path in data or []], "cores": default_lanes()}
    how["commit"] = commit()
    records.require(how, {manifest.name: manifest.version for manifest in manifests}, {**INT8, **variants})
    # Absolute but not resolved: a virtual environment's Python is a link to another.
    peers_python = python.absolute() if python is not None else environment.make(venv.absolute())
    with tempfile.TemporaryDirectory(prefix="league-") as scratch:
        networks = [
            prepare(path, data or [], peers_python, Path(scratch), port, fraction, variants)
            for path in bundle or BUNDLES
        ]
        names = {peer.name for network in networks for peer in network.peers}
        if only and not names.issuperset(only):
            raise typer.BadParameter(f"there are {', '.join(sorted(names))}", param_hint="--only")
        for round_ in range(1, (rounds or int(preset["rounds"])) + 1):
            for network in networks:
                for peer in network.peers:
                    if (not only or peer.name in only) and not records.has(network.name, peer.name, round_):
                        one_round(network, peer, round_, records, plan, how, folder)
                        write_tables(records, folder, output)
    plot(records, folder / "league.png")
    print(write_tables(records, folder, output))


def write_tables(records: Records, folder: Path, output: Path | None) -> str:
    """Write the tables after every server, so that an interrupted run has them too; returns the Markdown."""
    text = markdown(records)
    for path in filter(None, (folder / "table.md", output)):
        path.write_text(text)
    (folder / "results.json").write_text(json.dumps([r.__dict__ for r in records.all], indent=2) + "\n")
    return text


if __name__ == "__main__":
    run(main)
