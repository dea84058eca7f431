"""From your own PyTorch module to a running server.

    python -m examples.own_network --output runs/own-network
    python -m service --bundle runs/own-network

`ResidualNetwork` below does not depend on ExitServe: it is a module that returns a list of logits, cheapest exit first.
The code after it works for any such module: it is trained, evaluated on held-out images, cut into stages, exported and
packed. Without `--data`, the images are SYNTHETIC: simple shapes drawn here, so that nothing has to be downloaded; the
network then only serves to show the steps. `--data` takes a folder with train/CLASS/* and val/CLASS/*.

With `--epochs 0`, a trained network is packed as it is. The images in train/ then set its thresholds, so it must NOT
have been trained on them (networks are more confident on training images than on new ones). val/ measures its accuracy:

    python -m examples.own_network --network my_network.py:load --epochs 0 --data IMAGES --image-size 224 --output ...

`training.checking` has the requirements on a network, which are checked before training. Training here is minimal:
unlike `python -m training train`, it cannot be resumed.
"""

import argparse
import importlib.util
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from models.bundle import BundleError
from models.bundle_writing import check_target, write_bundle
from models.cost import measure_cost
from models.staging import StagingError
from training.augment import DeviceImages
from training.calibration import run_exits
from training.checking import NetworkError, check_network
from training.data import load_image_set
from training.evaluation import Evaluation, calibration_of, evaluate
from training.export import export_stages
from training.image_set import DataError, ImageSet, Split
from training.packing import bundle_name
from training.telling import classes_without

SHAPES = ["disc", "ring", "square", "triangle", "cross", "bars"]
AS_IT_IS = "train it with code of your own, and pack it as it is: --epochs 0"
LEAST_IMAGES = 10  # for training: a fifth is held out, and thresholds need two images


class ResidualBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv_1, self.norm_1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv_2, self.norm_2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride) if stride > 1 or n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm_1(self.conv_1(x)), inplace=True)
        out = self.norm_2(self.conv_2(out))
        out += self.shortcut(x)
        return functional.relu(out, inplace=True)


class ResidualNetwork(nn.Module):
    """A small residual network with a head after each of its three groups of blocks."""

    def __init__(self, n_classes: int, image_size_px: int = 32) -> None:
        super().__init__()
        stride = max(1, image_size_px // 32)  # larger images are downsampled at once
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, max(3, stride), stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        widths = (16, 32, 64)
        self.groups, self.heads = nn.ModuleList(), nn.ModuleList()
        for n_in, n_out in zip((16, *widths), widths, strict=False):
            self.groups.append(nn.Sequential(ResidualBlock(n_in, n_out, 2), ResidualBlock(n_out, n_out, 1)))
            self.heads.append(nn.Linear(4 * 4 * n_out, n_classes))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images [rows, 3, size, size] to the logits [rows, classes] of three exits."""
        x, logits = self.stem(images), []
        for group, head in zip(self.groups, self.heads, strict=True):
            x = group(x)
            logits.append(head(functional.adaptive_avg_pool2d(x, 4).flatten(1)))
        return logits


def draw_shapes(n_images: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw noisy shapes, randomly rotated and placed: images [n_images, 32, 32, 3] and labels. Some are hard to see."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(SHAPES), n_images)
    angle, size = rng.uniform(0, 2 * np.pi, (n_images, 1, 1)), rng.uniform(7, 13, (n_images, 1, 1))
    centre = rng.uniform(12, 20, (2, n_images, 1, 1))
    down, right = np.mgrid[0:32, 0:32]
    x, y = (right - centre[0]) / size, (down - centre[1]) / size
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    radius, square = np.hypot(x, y), np.maximum(np.abs(x), np.abs(y))
    inside = np.stack(
        [
            radius < 0.9,
            (radius < 1.0) & (radius > 0.6),
            square < 0.8,
            np.maximum(-y, np.abs(x) * 0.87 + y * 0.5) < 0.55,
            (square < 1.0) & (np.minimum(np.abs(x), np.abs(y)) < 0.28),
            (square < 0.9) & (np.abs(np.abs(x) - 0.6) < 0.28),
        ]
    )[labels, np.arange(n_images)]
    ground = rng.uniform(60, 195, (n_images, 1, 1, 3))
    contrast = rng.uniform(15, 90, (n_images, 1, 1, 1)) * rng.choice([-1, 1], (n_images, 1, 1, 3))
    noise = rng.uniform(5, 35, (n_images, 1, 1, 1)) * rng.normal(size=(n_images, 32, 32, 3))
    return np.clip(ground + contrast * inside[..., None] + noise, 0, 255).astype(np.uint8), labels


def synthetic_shapes(n_images: int) -> ImageSet:
    return ImageSet(
        "synthetic shapes",
        *draw_shapes(n_images, seed=1),
        *draw_shapes(max(100, n_images // 5), seed=2),
        class_names=SHAPES,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def on_cpu(images: ImageSet, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> DeviceImages:
    return DeviceImages(pixels, labels, images.mean, images.std, torch.device("cpu"), padding_px=2)


def train(network: nn.Module, images: DeviceImages, epochs: int, batch_rows: int = 64) -> None:
    """Train with the plain joint objective: the sum of every exit's cross-entropy.

    Raises:
        NetworkError: no gradient can be computed, or the loss is no longer a number.
    """
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    n_batches = -(-len(images) // batch_rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=epochs * n_batches)
    network.train()
    for epoch in range(1, epochs + 1):
        losses = []
        # Batches of about equal size: BatchNorm1d fails on a batch of a single image.
        for rows in torch.randperm(len(images), generator=generator).tensor_split(n_batches):
            pixels, labels = images.augmented(rows, generator)
            loss = torch.stack([functional.cross_entropy(logits, labels) for logits in network(pixels)]).sum()
            optimiser.zero_grad()
            try:
                loss.backward()
            except RuntimeError as error:  # such as frozen weights, or changes in place
                reason = str(error).partition("\n")[0]
                raise NetworkError(f"the network can't be trained ({reason}); {AS_IT_IS}") from error
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NetworkError(f"epoch {epoch}: the loss is no longer a number; {AS_IT_IS}")
        print(f"epoch {epoch} of {epochs}: loss {np.mean(losses):.3f}")


def make_bundle(network: nn.Module, images: ImageSet, split: Split, training: dict[str, Any], output: Path) -> None:
    """Evaluate the exits on held-out and test images, export the network in stages, and write the bundle."""
    height_px, width_px = images.train_images.shape[1:3]
    held_out_pixels, held_out_labels = images.train_images[split.held_out], images.train_labels[split.held_out]
    held_out = run_exits(network, on_cpu(images, held_out_pixels, held_out_labels), "held out")
    test = run_exits(network, on_cpu(images, images.test_images, images.test_labels), "test")
    evaluation = evaluate(held_out, test, measure_cost(network, images.image_size_px))
    name = bundle_name(None, output)
    with TemporaryDirectory() as folder:
        contents = Path(folder)
        stages = export_stages(network, (height_px, width_px), images.mean, images.std, contents)
        (contents / "README.md").write_text(f"# {name}\n\n{describe(network, images)}\n\n{table(evaluation)}\n")
        manifest = {
            "name": name,
            "description": describe(network, images),
            "architecture": "onnx",  # not one of ExitServe's architectures: the bundle has only its stages
            "arguments": {},
            "class_names": images.class_names,
            "input": {"height_px": height_px, "width_px": width_px, "mean": [*images.mean], "std": [*images.std]},
            "temperatures": [],
            "stages": stages,
            **evaluation.manifest_fields(),
            "training": training,
            "data": {
                "name": images.name,
                "split_sha256": split.sha256,
                "train_images": len(split.train),
                "heldout_images": len(split.held_out),
                "test_images": len(images.test_labels),
            },
        }
        write_bundle(output, manifest, calibration_of(held_out), contents, replace=True)
    print(table(evaluation))


def load_network(place: str, n_classes: int) -> nn.Module:
    """Import `place`, FILE.py:NAME, call it with the number of classes, and return the network that it returns.

    Raises:
        ImportError: there is no such file or name, or it does not return a module.
    """
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ImportError(f"--network {place}: there is no file {file!r}; write FILE.py:NAME")
    sys.path.insert(0, str(path.resolve().parent))  # for its own imports
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"--network {place}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ImportError(f"--network {place}: {file} does not define {name!r}")
    network: Any = getattr(module, name)(n_classes)
    if not isinstance(network, nn.Module):
        raise ImportError(f"--network {place}: {name}({n_classes}) does not return a torch.nn.Module")
    return network


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a parser for integer options of at least `minimum`."""

    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return number


def describe(network: nn.Module, images: ImageSet) -> str:
    return f"{type(network).__name__}, packed by examples/own_network.py, calibrated on {images.name}."


def table(evaluation: Evaluation) -> str:
    rows = (f"| {e.exit} | {e.executed_mflops:.2f} | {100 * e.test_accuracy:.1f} % |" for e in evaluation.exits)
    return "\n".join(["| exit | MFLOPs (multiply-adds) | test accuracy |", "|---|---|---|", *rows])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.own_network", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the bundle; an existing one is replaced")
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/* and val/CLASS/*; else synthetic shapes")
    parser.add_argument(
        "--network",
        metavar="FILE.py:NAME",
        help="function to use instead of the example's network: called with the number of classes, it returns a module "
        "that takes images normalised like ImageNet's and returns a list of logits, classes ordered by folder name",
    )
    parser.add_argument(
        "--image-size", type=at_least(8), default=64, help="side in pixels at which --data is read (default: 64)"
    )
    parser.add_argument(
        "--images", type=at_least(LEAST_IMAGES), default=6000, help="synthetic images to draw (default: 6000)"
    )
    parser.add_argument("--epochs", type=at_least(0), default=8, help="epochs of training; 0: none (default: 8)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        check_target(options.output, replace=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        images = load_image_set(options.data, options.image_size) if options.data else synthetic_shapes(options.images)
        n_classes, n_images = len(images.class_names), len(images.train_labels)
        if n_images < LEAST_IMAGES:
            raise DataError(f"{options.data}: {n_images} training images; give {LEAST_IMAGES} or more")
        if options.network:
            network = load_network(options.network, n_classes)
        else:
            network = ResidualNetwork(n_classes, images.image_size_px)
        check_network(network, images)
        split = Split(train=np.arange(0), held_out=np.arange(n_images))
        if options.epochs:
            split = Split.make(n_images, n_images // 5, seed=0)
        for note in (*images.notes, *(classes_without(images, split) if options.epochs else ())):
            print(f"note: {note}")
        if options.epochs:
            trained_on = on_cpu(images, images.train_images[split.train], images.train_labels[split.train])
            train(network, trained_on, options.epochs)
        network.eval()
        training = {"network": options.network or "examples/own_network.py", "epochs": options.epochs, "seed": 0}
        make_bundle(network, images, split, training, options.output)
    except (DataError, NetworkError, StagingError, BundleError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sample = options.output.with_name(f"{options.output.name}-sample.png")
    Image.fromarray(images.test_images[0]).save(sample)
    print(f"\na sample, {images.class_names[images.test_labels[0]]!r}: {sample}. To serve and classify it:")
    print(f"  python -m service --bundle {shlex.quote(str(options.output))}")
    body = shlex.quote(f"@{sample}")
    print(f"  curl --data-binary {body} -H 'Content-Type: image/png' http://127.0.0.1:8000/classify")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # as shells tell a command that Ctrl-C has ended
