"""The commands of `python -m training` besides its four steps: for bundles, other training methods and analysis."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from training.options import (
    DEFAULT_SIZE_PX,
    MAX_SEED,
    DataOption,
    Device,
    DeviceOption,
    GatesOn,
    HeadsStart,
    ImageSizeOption,
    RunArgument,
    images_of,
    shipped,
    side_px,
    typed,
)

tools = typer.Typer()


@tools.command(short_help="Recreate the run of a bundle from the bundle.")
def unpack(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle that `export` wrote.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run to make.")],
    data: DataOption,
) -> None:
    """Recreate the run of a bundle from the bundle itself, to calibrate, evaluate and export it again."""
    from training.checkpoint import RunFolder
    from training.data import load_image_set
    from training.unpacking import unpack as unpack_bundle

    unpack_bundle(bundle, RunFolder(run), load_image_set(data, side_px(bundle)))
    typer.echo(f"{run}: unpacked from {bundle}; next: {typed('calibrate', run, '--data', data)}")


@tools.command(short_help="Add int8 stages to a bundle.")
def quantize(
    bundle: Annotated[Path, typer.Argument(help="A bundle that was exported here; no run is needed.")],
    data: DataOption,
    images: Annotated[int, typer.Option(min=1, help="Training images that determine the ranges of activations.")] = 500,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the new bundle; by default the old one is replaced.")
    ] = None,
) -> None:
    """Add int8 stages to a bundle, for `python -m service --precision int8`; measures their accuracy and fp32's."""
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


@tools.command(short_help="Draw the images that leave first and last.")
def sheet(
    run: RunArgument,
    data: DataOption,
    fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Budget, as a fraction of the full network's cost.")
    ] = 0.5,
) -> None:
    """Draw the test images of an evaluated run that leave first and last at a budget; writes sheet.png."""
    from training.checkpoint import RunFolder
    from training.contact_sheet import draw_sheet

    folder = RunFolder(run)
    typer.echo(f"wrote {draw_sheet(folder, images_of(folder, data), fraction)}")


@tools.command(short_help="Test what else could predict whether going on helps.")
def signals(
    run: RunArgument,
    data: DataOption,
    device: DeviceOption = Device.auto,
    images: Annotated[
        int | None, typer.Option(min=100, help="Training images to fit gates on; by default, all.")
    ] = None,
) -> None:
    """Test, on a calibrated run, which signals predict whether going on helps; prints leads, writes signals.csv."""
    from rich.console import Console

    from training.checkpoint import RunFolder
    from training.signals import judge
    from training.signals_report import print_signals, write_signals

    folder = RunFolder(run)
    results = judge(folder, images_of(folder, data), device.resolve(), images)
    write_signals(results, run / "signals.csv")
    print_signals(results, Console(width=160))
    typer.echo(f"{run}: wrote signals.csv")


@tools.command(short_help="Train gates on a finished network (JEI-DNN).")
def gate(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run; it is unchanged, except for a cache.")],
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Folder of the run to make.")],
    trade_off: Annotated[
        float,
        typer.Option(
            min=0,
            max=1e6,
            help="Nats of cross-entropy that the full network's cost is worth; larger: images leave earlier.",
        ),
    ] = 0.5,
    heads: Annotated[
        HeadsStart,
        typer.Option(
            help="Last layers: trained from their weights, trained from fresh ones, or kept (only gates are trained)."
        ),
    ] = "trained",
    gates_on: Annotated[
        GatesOn,
        typer.Option(help="Images to fit gates on; heldout: new to the network; training: as published."),
    ] = "heldout",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the heads over the training images.")] = 8,
    passes: Annotated[
        int, typer.Option(min=0, help="Passes over the training images with augmentation; 0: one without.")
    ] = 1,
    undetached: Annotated[
        bool, typer.Option("--undetached", help="Use the heads' loss as published, in which gates cancel out.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the order, augmentation, folds and fresh layers.")
    ] = 0,
    device: DeviceOption = Device.auto,
) -> None:
    """Train gates, and with them the last layers of the heads, on a finished network: the rival method JEI-DNN.

    \b
    All else stays frozen. The result is a run, evaluated and exported like any other; its images leave by gates:
      python -m training unpack    models/zoo/cifar100-msdnet runs/first --data DATA   # where there is no run
      python -m training calibrate runs/first --data DATA
      python -m training evaluate  runs/first
      python -m training gate      runs/first --data DATA --trade-off 0.5 --output runs/gated
      python -m training evaluate  runs/gated
      python -m training export    runs/gated --output models/zoo/gated
    Prints its gain over the run it started from; writes gates.json, gates.csv and gates.png into OUTPUT.
    The heads' inputs are cached in RUN (head_inputs.pt), so another trade-off starts in seconds.
    """
    from rich.console import Console

    from training.checkpoint import RunFolder
    from training.jei.record import Settings
    from training.jei.report import plot_report, print_report, report_of, write_report
    from training.jei.run import gate_run

    source, made = RunFolder(run), RunFolder(output)
    settings = Settings(trade_off, heads, gates_on, epochs, not undetached, seed)
    gates, shown = gate_run(source, made, images_of(source, data), settings, passes, device.resolve())
    report = report_of(source, made, gates, shown)
    write_report(report, output / "gates.csv")
    plot_report(report, gates, output / "gates.png")
    print_report(report, gates, Console(width=160))
    typer.echo(f"{output}: wrote gates.json, gates.csv, gates.png; next: {typed('evaluate', output)}")


@tools.command(short_help="Train variants of a recipe and compare them.")
def study(
    name: Annotated[
        str, typer.Argument(help=f"A study that ships ({shipped('studies')}), or a .toml file of your own.")
    ],
    data: DataOption,
    folder: Annotated[Path, typer.Option("--runs", help="Folder of its runs; resumes what is there.")],
    device: DeviceOption = Device.auto,
    processes: Annotated[int, typer.Option(min=1, help="Processes to train with.")] = 1,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Train only this seed, for machines that share a study; repeatable."),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Train nothing; report on the runs that are there.")] = False,
    image_size_px: ImageSizeOption = DEFAULT_SIZE_PX,
) -> None:
    """Train variants of a recipe that differ in one thing each; prints what each gains, writes study.csv and .png."""
    from rich.console import Console

    from training.study import Study, results_of, run_study, write_table
    from training.study_report import plot_study, plot_valid_shares, print_study

    loaded = Study.load(name)
    if not report:
        run_study(loaded, folder, data, device.resolve(), processes, seeds, image_size_px)
    results = results_of(loaded, folder)
    write_table(results, folder / "study.csv")
    plot_study(folder / "study.png", loaded.description, results)
    plot_valid_shares(folder / "valid.png", loaded.description, results)
    print_study(results, Console())
    typer.echo(f"{folder}: wrote study.csv, study.png, valid.png")
