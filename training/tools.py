"""The commands of `python -m training` beside its four steps: bundles made anew, and what to learn from runs."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from training.options import DataOption, Device, DeviceOption, RunArgument, images_of, shipped, side_px, typed

tools = typer.Typer()


@tools.command(short_help="Make the run of a bundle again, from the bundle.")
def unpack(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle that `export` wrote.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run to make.")],
    data: DataOption,
) -> None:
    """Make the run of a bundle again from the bundle itself, to calibrate, evaluate and export it anew."""
    from training.checkpoint import RunFolder
    from training.data import load_image_set
    from training.unpacking import unpack as unpack_bundle

    unpack_bundle(bundle, RunFolder(run), load_image_set(data, side_px(bundle)))
    typer.echo(f"{run}: unpacked from {bundle}; next: {typed('calibrate', run, '--data', data)}")


@tools.command(short_help="Add int8 stages to a bundle.")
def quantize(
    bundle: Annotated[Path, typer.Argument(help="A bundle that was exported here; no run is needed.")],
    data: DataOption,
    images: Annotated[int, typer.Option(min=1, help="Training images that show what activations range over.")] = 500,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the new bundle; by default it replaces the old.")
    ] = None,
) -> None:
    """Add int8 stages to a bundle, for `python -m service --precision int8`; measures their accuracy beside fp32."""
    from rich.console import Console

    from training.data import load_image_set
    from training.quantising import quantise
    from training.tables import print_precisions

    made = quantise(bundle, load_image_set(data, side_px(bundle)), images, output or bundle)
    print_precisions(made, Console())
    typer.echo(
        f"{made.bundle.path}: version {made.bundle.manifest.version}; "
        f"serve it: python -m service --bundle {shlex.quote(str(made.bundle.path))} --precision int8"
    )


@tools.command(short_help="Draw images that leave first, and last.")
def sheet(
    run: RunArgument,
    data: DataOption,
    fraction: Annotated[float, typer.Option(help="Budget, of the full network's cost.")] = 0.5,
) -> None:
    """Draw test images that leave first and last at a budget, once a run is evaluated; writes sheet.png."""
    from training.checkpoint import RunFolder
    from training.contact_sheet import draw_sheet

    folder = RunFolder(run)
    typer.echo(f"wrote {draw_sheet(folder, images_of(folder, data), fraction)}")


@tools.command(short_help="What else could tell whether going on helps?")
def signals(
    run: RunArgument,
    data: DataOption,
    device: DeviceOption = Device.auto,
    images: Annotated[
        int | None, typer.Option(min=100, help="Training images to fit gates on; by default all.")
    ] = None,
) -> None:
    """Try signals of whether going on helps on a run that was calibrated; prints their leads, writes signals.csv."""
    from rich.console import Console

    from training.checkpoint import RunFolder
    from training.signals import judge
    from training.signals_report import print_signals, write_signals

    folder = RunFolder(run)
    results = judge(folder, images_of(folder, data), device.resolve(), images)
    write_signals(results, run / "signals.csv")
    print_signals(results, Console(width=160))
    typer.echo(f"{run}: wrote signals.csv")


@tools.command(short_help="Train variants of a recipe and compare them.")
def study(
    name: Annotated[
        str, typer.Argument(help=f"A study that ships ({shipped('studies')}), or a .toml file of your own.")
    ],
    data: DataOption,
    folder: Annotated[Path, typer.Option("--runs", help="Folder of its runs; goes on with what is there.")],
    device: DeviceOption = Device.auto,
    processes: Annotated[int, typer.Option(min=1, help="Processes to train with.")] = 1,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Train this of its seeds alone, as one of several that share a study; may repeat."),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Train nothing: tell of the runs that are there.")] = False,
) -> None:
    """Train variants of a recipe, one thing changed at a time; prints what each is worth, writes study.csv, .png."""
    from rich.console import Console

    from training.study import Study, results_of, run_study, write_table
    from training.study_report import plot_study, plot_valid_shares, print_study

    loaded = Study.load(name)
    if not report:
        run_study(loaded, folder, data, device.resolve(), processes, seeds)
    results = results_of(loaded, folder)
    write_table(results, folder / "study.csv")
    plot_study(folder / "study.png", loaded.description, results)
    plot_valid_shares(folder / "valid.png", loaded.description, results)
    print_study(results, Console())
    typer.echo(f"{folder}: wrote study.csv, study.png, valid.png")
