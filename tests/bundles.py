"""A real but tiny bundle for tests, made in seconds with the code that makes all bundles.

Weights and images are random, so its answers mean nothing. Like those of trained networks, though, its exits agree
more often the more confident they are. Labels are the last exit's answers, with noise.
"""

import fcntl
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from models.bundle import BundleError, files_digest, load_bundle
from models.bundle_writing import write_bundle
from models.calibration import Calibration
from models.cost import measure_cost
from models.manifest import FileInfo
from models.registry import build_network
from models.scores import plain_scores, score_exits
from training.export import Normalise, export_stages
from training.image_set import ImageSet, Split
from training.quantising import quantise

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGE_SIZE_PX = 32
CLASS_NAMES = [f"noise {i}" for i in range(10)]
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
TEMPERATURE = 1.0
N_HELDOUT, N_TRAIN, N_TEST, SEED = 2000, 100, 200, 0
ARGUMENTS = {
    "config": "C-batch-4",
    "n_classes": len(CLASS_NAMES),
    "n_blocks": 4,
    "base": 1,
    "step": 1,
    "n_channels": 4,
    "growth_rate": 4,
    "growth_factors": [1, 1, 2],
    "bottleneck_factors": [1, 1, 2],
    "bottleneck": False,
    "temperatures": TEMPERATURE,
}


def random_images(n_images: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return images [n_images, 32, 32, 3] of the kind the tiny bundle is calibrated on: coarse and fine noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(n_images, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    fine = rng.normal(size=(n_images, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3))
    return np.clip(128 + 45 * coarse + 25 * fine, 0, 255).astype(np.uint8)


def tiny_bundle(folder: Path) -> Path:
    """Put a tiny bundle into `folder` (new or empty) and return it; four exits, 32 px, ten classes, about 0.5 MFLOPs.

    It is a copy, which tests may damage, of a cached one that is rebuilt when its sources change (about ten seconds).
    """
    return Path(shutil.copytree(_built(), folder, dirs_exist_ok=True))


def tiny_int8_bundle(folder: Path) -> Path:
    """The same bundle with int8 stages besides the float ones."""
    return Path(shutil.copytree(_quantised(), folder, dirs_exist_ok=True))


@torch.no_grad()
def tiny_network() -> nn.Module:
    """Return the network of the tiny bundle, in evaluation mode: it takes normalised float images [rows, 3, 32, 32]."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network("msdnet", ARGUMENTS)
    images = _normalised(random_images(256, seed=1))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one pass sets the statistics, so that maps do not vanish with depth
    network.train()(images)
    network.eval()
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    for depth, head in enumerate(heads):
        head.weight.mul_(15.0 * 0.7**depth)  # confident about some images; later heads add less and less
        head.bias.zero_()
    ensembled = network(images)
    heads[0].bias.copy_(-ensembled[0].mean(dim=0))  # so that every class is predicted
    for head, (before, after) in zip(heads[1:], pairwise(ensembled), strict=True):
        head.bias.copy_(-(after - TEMPERATURE * before).mean(dim=0))
    return network


def _normalised(images: NDArray[np.uint8]) -> torch.Tensor:
    return Normalise(MEAN, STD)(torch.from_numpy(images))


def tiny_images() -> ImageSet:
    """The images of the tiny bundle, split like those of a run.

    Held-out images are labelled with the last exit's answer, or noise; training images, which are unused, with 0.
    """
    split = Split.make(N_TRAIN + N_HELDOUT, N_HELDOUT, SEED)
    held_out = random_images(N_HELDOUT, seed=2)
    images = np.empty((N_TRAIN + N_HELDOUT, *held_out.shape[1:]), np.uint8)
    images[split.held_out], images[split.train] = held_out, random_images(N_TRAIN, seed=4)
    test = random_images(N_TEST, seed=5)
    with torch.no_grad():
        answers, test_answers = (
            tiny_network()(_normalised(part))[-1].argmax(dim=1).numpy() for part in (held_out, test)
        )
    rng = np.random.default_rng(3)
    noise = rng.random(N_HELDOUT) < 0.1
    labels = np.zeros(len(images), np.int64)
    labels[split.held_out] = np.where(noise, rng.integers(0, len(CLASS_NAMES), N_HELDOUT), answers)
    return ImageSet("synthetic noise", images, labels, test, test_answers, CLASS_NAMES, tuple(MEAN), tuple(STD))


@functools.cache
def _built() -> Path:
    """The tiny bundle of the current sources, built by the first test that needs it."""
    sources = [*sorted((REPOSITORY / "models").glob("*.py")), REPOSITORY / "training/export.py", Path(__file__)]
    folder = _cache("tiny-bundle", sources)
    with _one_at_a_time(folder), tempfile.TemporaryDirectory() as contents:
        try:
            load_bundle(folder)
        except BundleError:
            _build(folder, Path(contents))
    return folder


@functools.cache
def _quantised() -> Path:
    makers = ("training/quantisation.py", "training/quantising.py", "training/stage_sessions.py")
    sources = [*sorted((REPOSITORY / "models").glob("*.py")), *(REPOSITORY / maker for maker in makers)]
    folder = _cache("tiny-int8-bundle", [*sources, REPOSITORY / "training/export.py", Path(__file__)])
    with _one_at_a_time(folder):
        try:
            load_bundle(folder)
        except BundleError:
            quantise(_built(), tiny_images(), N_TRAIN, folder)
    return folder


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lock `folder`, so that one of several test processes builds the bundle and the others find it."""
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cache(name: str, sources: list[Path]) -> Path:
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources) + torch.__version__.encode())
    return REPOSITORY / ".pytest_cache" / f"{name}-{digest.hexdigest()[:16]}"


@torch.no_grad()
def _build(folder: Path, contents: Path) -> None:
    network = tiny_network()
    images, split = tiny_images(), Split.make(N_TRAIN + N_HELDOUT, N_HELDOUT, SEED)
    logits = [x.numpy() for x in network(_normalised(images.train_images[split.held_out]))]
    labels = images.train_labels[split.held_out]
    correct = np.stack([x.argmax(axis=1) == labels for x in logits], axis=1)
    scores = {name: score_exits(score, logits) for name, score in plain_scores(len(logits)).items()}
    calibration = Calibration({name: values.astype(np.float32) for name, values in scores.items()}, correct)
    stages = export_stages(network, IMAGE_SIZE_PX, MEAN, STD, contents)
    (contents / "README.md").write_text("A tiny network with random weights, for tests.\n")
    cost = measure_cost(network, IMAGE_SIZE_PX)
    exits = [
        {
            "published_mflops": cost.published[i] / 1e6,
            "executed_mflops": cost.executed[i] / 1e6,
            "macs_m": cost.published_macs[i] / 1e6,
            "executed_macs_m": cost.executed_macs[i] / 1e6,
            "test_accuracy": None,
            "heldout_accuracy": float(correct[:, i].mean()),
        }
        for i in range(len(logits))
    ]
    manifest = {
        "name": "tiny-random",
        "description": "Random weights, synthetic images and labels: only for tests.",
        "architecture": "msdnet",
        "arguments": ARGUMENTS,
        "class_names": CLASS_NAMES,
        "input": {"height_px": IMAGE_SIZE_PX, "width_px": IMAGE_SIZE_PX, "mean": MEAN, "std": STD},
        "temperatures": [TEMPERATURE],
        "exits": exits,
        "stages": stages,
        "score": "logit_margin",
        "family": None,
        "predictor": None,
        "training": {"recipe": "none: random weights", "seed": SEED},
        "data": {
            "name": "synthetic noise",
            "split_sha256": split.sha256,
            "train_images": N_TRAIN,
            "heldout_images": N_HELDOUT,
            "test_images": N_TEST,
        },
    }
    write_bundle(folder, manifest, calibration, contents, replace=True)


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    (path / "manifest.json").write_text(json.dumps(manifest))


def seal(path: Path, manifest: dict[str, Any] | None = None) -> None:
    """Update sizes, digests and version to match the changed files, as a forger would."""
    manifest = manifest or read_manifest(path)
    for file, info in manifest["files"].items():
        data = (path / file).read_bytes()
        info.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest["version"] = files_digest({file: FileInfo(**info) for file, info in manifest["files"].items()})
    write_manifest(path, manifest)


def refusal(path: Path, verify: bool = True) -> BundleError:
    with pytest.raises(BundleError) as refused:
        load_bundle(path, verify)
    error = refused.value
    assert error.file in str(error)
    assert error.reason in str(error)
    assert error.fix in str(error)
    assert len(str(error)) < 1000
    return error
