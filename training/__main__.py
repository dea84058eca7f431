"""`python -m training`: from images to a bundle in four steps."""

import errno
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import typer

from training.errors import TrainingError
from training.options import (
    DEFAULT_SIZE_PX,
    MAX_SEED,
    DataOption,
    Device,
    DeviceOption,
    ImageSizeOption,
    RunArgument,
    images_of,
    shipped,
    typed,
)
from training.tools import tools

HELP = """Train a network with exits and make a bundle that the service serves. Four steps, each reading what the one
before left in the run's folder:

\b
  1. python -m training train     runs/first --recipe cifar100-fast --data DATA
  2. python -m training calibrate runs/first --data DATA    exit scores of the held-out images
  3. python -m training evaluate  runs/first                accuracy per exit, budget curve, plots
  4. python -m training export    runs/first --output models/zoo/first

DATA is CIFAR-100 (cifar-100-python.tar.gz or its folder) or a folder with train/CLASS/* and val/CLASS/*, or with
CLASS/* alone.
A run that is stopped by --time-limit, Ctrl-C or SIGTERM resumes where it was when the same command is given again; a
run that is killed resumes from the end of its last epoch.
To compare recipes, `python -m training study` trains variants of one and reports the effect of each change."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of writes, which may name no file

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(help=HELP)
def main() -> None:
    pass


@app.command(short_help="Step 1: train a recipe on images; repeat to resume.")
def train(
    run: Annotated[Path, typer.Argument(help="Folder of the run: created if new, resumed if it holds a checkpoint.")],
    data: DataOption,
    recipe: Annotated[
        str, typer.Option(help=f"A recipe that ships ({shipped('recipes')}), or a .toml file of your own.")
    ] = "cifar100-fast",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a field of the recipe, e.g. optimisation.epochs=5 (listed in docs/training.md); repeatable.",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Start from the weights of this bundle; with other classes, the last layers start afresh."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the split, initial weights, image order and augmentation.")
    ] = 0,
    device: DeviceOption = Device.auto,
    processes: Annotated[int, typer.Option(min=1, help="Training processes: the number of GPUs or of CPU cores.")] = 1,
    time_limit_minutes: Annotated[
        float | None, typer.Option("--time-limit", min=0, help="Minutes after which to save and stop.")
    ] = None,
    image_size_px: ImageSizeOption = DEFAULT_SIZE_PX,
) -> None:
    """Step 1: train; writes run.json, split.npz, checkpoint.pt and log.jsonl into the run's folder."""
    if processes > 1 and "RANK" not in os.environ:
        from training.launching import launch

        raise typer.Exit(launch(processes, sys.argv[1:]))
    from training.checkpoint import RunFolder
    from training.data import load_image_set
    from training.locking import alone_in
    from training.loop import Trainer
    from training.processes import Processes, end_if_lost
    from training.recipe import Recipe
    from training.telling import classes_without, summary

    loaded = Recipe.load(recipe, settings or [])
    torch_device = device.resolve()
    command = f"{typed('train', 'RUN', '--recipe', Path(recipe).name)} --data DATA --seed {seed}"
    command += "".join(f" --set {shlex.quote(setting)}" for setting in settings or [])
    command += f" --from {shlex.quote(start.resolve().name)}" if start else ""
    with alone_in(run) if _reports() else nullcontext():
        group = Processes.join(torch_device.type)
        try:
            command += f" --processes {group.count}" if group.count > 1 else ""
            images = load_image_set(data, image_size_px)
            if images.listing and image_size_px != DEFAULT_SIZE_PX:  # CIFAR-100, which has no listing, has a fixed size
                command += f" --image-size {image_size_px}"
            trainer = Trainer(loaded, images, RunFolder(run), seed, group, command, start)
            if group.is_first:
                about = trainer.train_images, len(trainer.held_out), loaded.optimisation
                notes = *images.notes, *classes_without(images, trainer.split)
                for note in (*notes, summary(*about, trainer.steps_per_epoch, trainer.precision)):
                    typer.echo(f"{run}: {note}")
            del images  # the trainer has its own copy
            ended = trainer.train(None if time_limit_minutes is None else 60 * time_limit_minutes)
            reached = f"step {trainer.progress.step} of {trainer.total_steps}"
            del trainer  # before the group ends, see `leave`
        except RuntimeError as error:
            end_if_lost(error)
            raise
        finally:
            group.leave()
    if not group.is_first:
        return
    if ended == "finished":
        typer.echo(f"{run}: trained; next: {typed('calibrate', run, '--data', data)}")
    else:
        typer.echo(f"{run}: stopped by the {ended} and saved at {reached}; give the same command again to resume")


@app.command(short_help="Step 2: scores of held-out and test images.")
def calibrate(
    run: RunArgument,
    data: DataOption,
    device: DeviceOption = Device.auto,
    half_weights: Annotated[
        bool, typer.Option("--half-weights", help="Round weights to half precision, for a bundle of half the size.")
    ] = False,
    as_trained: Annotated[
        bool,
        typer.Option(
            "--as-trained",
            help="Leave the ensemble as trained; by default its temperatures are fitted to the held-out images.",
        ),
    ] = False,
) -> None:
    """Step 2: run the network over held-out and test images; writes calibration.json, heldout.npz and test.npz."""
    from training.calibration import calibrate as calibrate_run
    from training.checkpoint import RunFolder

    folder = RunFolder(run)
    torch_device = device.resolve()
    record = calibrate_run(folder, images_of(folder, data), torch_device, half_weights, not as_trained)
    total = folder.read_description()["recipe"]["optimisation"]["epochs"]
    if record.epochs < total:
        typer.echo(f"note: trained for {record.epochs:.4g} of {total} epochs so far")
    typer.echo(
        f"{run}: calibrated on {record.heldout_images} held-out images, read {record.test_images} test images; "
        f"next: {typed('evaluate', run)}"
    )


@app.command(short_help="Step 3: accuracy per exit, budget curve, plots.")
def evaluate(run: RunArgument) -> None:
    """Step 3: accuracy per exit and for a budget; prints tables, writes results.json, .csv files and plots."""
    from rich.console import Console

    from training.calibration import CalibrationRecord, ExitOutputs
    from training.checkpoint import RunFolder
    from training.evaluation import cost_of
    from training.evaluation import evaluate as evaluate_outputs
    from training.jei.record import GateRecord
    from training.plots import plot_run
    from training.tables import print_evaluation, write_tables

    folder = RunFolder(run)
    record = CalibrationRecord.load(folder)
    outputs = ExitOutputs.load(folder.heldout), ExitOutputs.load(folder.test)
    evaluation = evaluate_outputs(*outputs, cost_of(folder, record), GateRecord.load(folder))
    tables, plots = write_tables(folder, evaluation), plot_run(folder, evaluation, record)
    evaluation.save(folder, record)  # last: it marks the run as evaluated
    print_evaluation(evaluation, Console())
    typer.echo(
        f"{run}: wrote results.json, {', '.join([*tables, *plots])}; next: {typed('export', run)} --output FOLDER"
    )


@app.command(short_help="Step 4: write the bundle that the service serves.")
def export(
    run: RunArgument,
    output: Annotated[Path, typer.Option(help="Folder of the bundle: new, or a bundle to replace.")],
    name: Annotated[str | None, typer.Option(help="Name of the bundle; by default, that of the output folder.")] = None,
    description: Annotated[str | None, typer.Option(help="Description in one line; by default, the recipe's.")] = None,
    images: Annotated[
        str | None, typer.Option(help="What the images are and their licence terms, for the model card.")
    ] = None,
) -> None:
    """Step 4: write the bundle that the service serves: stages, weights, calibration, model card."""
    from training.checkpoint import RunFolder
    from training.packing import bundle_name, pack

    version = pack(RunFolder(run), output, bundle_name(name, output), description, images)
    typer.echo(f"{output}: version {version}; serve it: python -m service --bundle {shlex.quote(str(output))}")


app.add_typer(tools)


def _reports() -> bool:
    """Whether this process reports for its group: it is the first of those that train together, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run_command() -> None:
    """Run the command line; errors that the user can fix are reported in one sentence, with status 2."""
    try:
        app()
    except (TrainingError, OSError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            message: object = (
                f"{error.strerror}: make room, also for temporary files in {gettempdir()}, or raise the limit, "
                "and give the same command again"
            )
        elif isinstance(error, OSError) and error.filename is None:
            raise  # names no file, so it is not the user's error
        else:
            message = error if isinstance(error, TrainingError) else f"{error.filename}: {error.strerror}"
        if _reports():
            typer.echo(f"error: {message}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_command()
