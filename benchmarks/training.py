"""Compares the training speed of a recipe with that of a plain PyTorch loop for the same network.

    python -m benchmarks.training --recipe cifar100-fast --processes 2

The plain loop is the usual one: a DataLoader whose worker processes crop, flip and normalise image by image, float32,
torch's default memory layout, one process with a thread per core. Both train on the same noise images (SYNTHETIC: only
speed is measured) in turns, so that changes in the machine's speed affect both. Multiply-adds are counted as three
times those of a forward pass: once forward, twice backward. Keep the machine otherwise idle.
"""

import json
import os
import pickle
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.options import JsonPath
from benchmarks.running import run
from models.cost import measure_cost
from training.checkpoint import RunFolder
from training.cifar100 import CIFAR100_MEAN, CIFAR100_STD
from training.data import load_image_set
from training.image_set import DataError, Split
from training.launching import launch
from training.numerics import precision_of
from training.objectives import network_of
from training.recipe import Recipe

FORWARD_AND_BACKWARD = 3
N_CLASSES = 100
HELD_OUT = 128  # images not used for training
WARM_UP_BATCHES = 3  # at the start of the plain loop, not timed
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Report:
    """Results. Rates are images/s, one per round."""

    recipe: str
    device: str
    image_size_px: int
    batch_rows: int
    processes: int
    workers: int  # of the plain loop's DataLoader
    mmacs_forward: float  # millions of multiply-adds of one image's forward pass
    ours: list[float]
    plain: list[float]
    peak_gmacs_per_s: dict[str, float]  # in large matrix products, by precision
    precision: str

    @property
    def speed_up(self) -> float:
        return median(self.ours) / median(self.plain)


class UsualDataset(Dataset[tuple[torch.Tensor, int]]):
    """One image at a time: padded, cropped, flipped and normalised on the CPU."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, padding_px: int) -> None:
        self.images, self.labels, self.padding_px = images, labels, padding_px
        self.mean = torch.tensor(CIFAR100_MEAN).view(3, 1, 1)
        self.std = torch.tensor(CIFAR100_STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(self.images[index]).permute(2, 0, 1).float().div(255)
        image = (image - self.mean) / self.std
        p, size_px = self.padding_px, image.shape[-1]
        if p:
            top, left = torch.randint(0, 2 * p + 1, (2,)).tolist()
            image = functional.pad(image, (p, p, p, p))[:, top : top + size_px, left : left + size_px]
        return image.flip(2) if torch.rand(1) < 0.5 else image, int(self.labels[index])


def plain_rate(recipe: Recipe, images: np.ndarray, labels: np.ndarray, device: torch.device, workers: int) -> float:
    """Images/s of the plain loop in one epoch, without its first batches."""
    o = recipe.optimisation
    network = network_of(recipe, N_CLASSES).to(device).train()
    optimiser = torch.optim.SGD(network.parameters(), o.learning_rate, o.momentum, weight_decay=o.weight_decay)
    dataset = UsualDataset(images, labels, recipe.augmentation.crop_padding_px)
    loader = DataLoader(
        dataset, o.batch_rows, shuffle=True, num_workers=workers, drop_last=True, pin_memory=device.type == "cuda"
    )
    began, n_images = 0.0, 0
    for step, (batch, targets) in enumerate(loader):
        if step == WARM_UP_BATCHES:
            _synchronise(device)
            began, n_images = time.perf_counter(), 0
        outputs = network(batch.to(device, non_blocking=True))
        targets = targets.to(device, non_blocking=True)
        loss = torch.stack([functional.cross_entropy(logits, targets) for logits in outputs]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        n_images += len(batch)
    _synchronise(device)
    return n_images / (time.perf_counter() - began)


def our_rate(recipe_name: str, settings: list[str], data: Path, device: torch.device, processes: int) -> float:
    """Images/s of the project's `train` command in its second epoch over the same images, without evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        changes = [f"--set={s}" for s in (*settings, "optimisation.epochs=2", f"held_out_images={HELD_OUT}")]
        options = ["--recipe", recipe_name, "--data", str(data), "--device", device.type, *changes]
        if launch(processes, ["train", str(run), *options]):
            raise typer.Exit(1)
        return float(RunFolder(run).read_log()[-1]["images_per_s"])


def peak_gmacs_per_s(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """10^9 multiply-adds per second in large matrix products, the machine's practical peak; best of `repeats`."""
    if device.type == "cuda":
        size *= 4
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        _synchronise(device)
        began = time.perf_counter()
        a @ b
        _synchronise(device)
        seconds.append(time.perf_counter() - began)
    return size**3 / min(seconds) / 1e9


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_noise(path: Path, n_images: int) -> Path:
    """Write noise in CIFAR-100's file format, so that `train` reads it like the real set; returns `path`."""
    draw = np.random.default_rng(0)
    path.mkdir()
    for part, n in (("train", n_images), ("test", 100)):
        flat = draw.integers(0, 256, (n, 3072), np.uint8)
        content = {b"data": flat, b"fine_labels": draw.integers(0, N_CLASSES, n).tolist()}
        (path / part).write_bytes(pickle.dumps(content, protocol=2))
    (path / "meta").write_bytes(pickle.dumps({b"fine_label_names": [str(n).encode() for n in range(N_CLASSES)]}, 2))
    return path


def measure(
    recipe_name: str,
    settings: list[str],
    device: torch.device,
    processes: int,
    workers: int,
    n_images: int,
    rounds: int,
) -> Report:
    """Time the project's training and the plain loop in turns."""
    recipe = Recipe.load(recipe_name, settings)
    fewest = HELD_OUT + (WARM_UP_BATCHES + 1) * recipe.optimisation.batch_rows
    if n_images < fewest:
        raise DataError(f"{n_images} images are too few for the plain loop to time a batch: give {fewest} or more")
    ours, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = write_noise(Path(folder) / "noise", n_images)
        images = load_image_set(data)
        train = Split.make(n_images, HELD_OUT, seed=0).train
        for _ in range(rounds):
            ours.append(our_rate(recipe_name, settings, data, device, processes))
            plain.append(plain_rate(recipe, images.train_images[train], images.train_labels[train], device, workers))
    cost = measure_cost(network_of(recipe, N_CLASSES), images.image_size_px)
    precision = precision_of(recipe.numerics, device)
    return Report(
        recipe=" ".join([recipe_name, *settings]),
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        image_size_px=images.image_size_px,
        batch_rows=recipe.optimisation.batch_rows,
        processes=processes,
        workers=workers,
        mmacs_forward=cost.published_macs[-1] / 1e6,
        ours=ours,
        plain=plain,
        peak_gmacs_per_s={name: peak_gmacs_per_s(device, DTYPES[name]) for name in {"fp32", precision}},
        precision=precision,
    )


def show(report: Report, console: Console) -> None:
    """Print a report as a table."""
    title = f"{report.recipe} on {report.device}, batches of {report.batch_rows} SYNTHETIC images"
    table = Table("", "this project", "plain loop", title=title)
    columns = [(report.ours, report.precision), (report.plain, "fp32")]
    rates = [f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})" for rates, _ in columns]
    table.add_row("images/s, median of rounds", *rates)
    table.add_row("speed-up", f"{report.speed_up:.2f} x", "1")
    gmacs = [FORWARD_AND_BACKWARD * report.mmacs_forward * median(rates) / 1e3 for rates, _ in columns]
    table.add_row("G multiply-adds/s", *(f"{g:.1f}" for g in gmacs))
    peaks = [report.peak_gmacs_per_s[precision] for _, precision in columns]
    table.add_row("measured peak of matrix products at its precision", *(f"{p:.0f}" for p in peaks))
    table.add_row("share of that peak", *(f"{g / p:.0%}" for g, p in zip(gmacs, peaks, strict=True)))
    table.add_row("processes / DataLoader workers", str(report.processes), str(report.workers))
    console.print(table)


def main(
    recipe: Annotated[str, typer.Option(help="A recipe for 32-px images.")] = "cifar100-fast",
    settings: Annotated[list[str] | None, typer.Option("--set", help="Change a field of the recipe.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes of this project; by default, one per core or GPU.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Workers of the plain loop's DataLoader.")] = 2,
    images: Annotated[int, typer.Option(min=1, help="Images per epoch.")] = 4_096,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per side.")] = 3,
    json_path: JsonPath = None,
) -> None:
    """Compare the training speed of a recipe with that of a plain PyTorch loop for the same network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n_processes = processes or (torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1)
    report = measure(recipe, settings or [], device, n_processes, workers, images, rounds)
    show(report, Console())
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    run(main)
