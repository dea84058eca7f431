"""`python -m training`: from images to a bundle in four steps."""

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

HELP = """Train a network with exits and make a bundle that the service serves. Four steps, each reading what the one before left in the run's folder:

    python -m training train     runs/first --recipe cifar100-fast --data DATA
    python -m training calibrate runs/first --data DATA   (exit scores of the held-out images)
    python -m training evaluate  runs/first --data DATA   (accuracy per exit, budget curve, plots)
    python -m training export    runs/first --output models/zoo/my-network

DATA is CIFAR-100 (cifar-100-python.tar.gz or its folder) or a folder with train/CLASS/* and val/CLASS/*.
A run that is stopped, by --time-limit or by force, goes on where it was when the same command is given again."""

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(help=HELP)
def main() -> None:
    pass


RunArgument = Annotated[Path, typer.Argument(help="Folder of the run: made if new, resumed if it holds a checkpoint.")]
DataOption = Annotated[Path, typer.Option("--data", envvar="EXITSERVE_DATA", help="CIFAR-100 archive or folder, or an image folder.")]


@app.command()
def train(
    run: RunArgument,
    data: DataOption,
    recipe: Annotated[str, typer.Option(help="Name of a recipe that ships (training/recipes/) or path of a .toml file.")] = "cifar100-fast",
    seed: Annotated[int, typer.Option(help="Of the split, the initial weights, the order and the augmentation.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    processes: Annotated[int, typer.Option(help="Processes to train with: GPUs, or CPU cores (two beat one process of two threads).")] = 1,
    time_limit_minutes: Annotated[Optional[float], typer.Option("--time-limit", help="Minutes after which to save and stop.")] = None,
    image_size_px: Annotated[int, typer.Option("--image-size", help="Side in pixels at which an image folder is read.")] = 224,
) -> None:
    """Step 1: train; writes checkpoint.pt, log.jsonl, run.json and split.npz into the run's folder."""
    if processes > 1 and "RANK" not in os.environ:
        from torch.distributed.run import main as torchrun

        torchrun(["--standalone", f"--nproc-per-node={processes}", "-m", "training", *sys.argv[1:]])
        return
    import torch

    from training.checkpoint import RunFolder
    from training.data import load_image_set
    from training.loop import Trainer
    from training.processes import Processes
    from training.recipe import Recipe

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    group = Processes.join(device)
    try:
        trainer = Trainer(Recipe.load(recipe), load_image_set(data, image_size_px), data, RunFolder(run), seed, group)
        finished = trainer.train(None if time_limit_minutes is None else 60 * time_limit_minutes)
    finally:
        group.leave()
    if group.is_first:
        again = "finished; next: python -m training calibrate" if finished else "stopped in time; the same command goes on"
        typer.echo(f"{run}: step {trainer.progress.step} of {trainer.total_steps}, {again}")


if __name__ == "__main__":
    from training.checkpoint import RunError
    from training.data import DataError
    from training.recipe import RecipeError

    try:
        app()
    except (DataError, RecipeError, RunError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
