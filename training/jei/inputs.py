"""The inputs of every head's last layer, for all images: the frozen part of the network runs once, before training.

They are cached in the run's folder, so that trying another trade-off starts in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.augment import DeviceImages
from training.calibration import CalibrationRecord, checked_split, in_batches, load_trained, parts_of
from training.checkpoint import RunFolder
from training.gates import HeadInputs
from training.image_set import ImageSet


@dataclass(frozen=True)
class Rows:
    """The inputs of the last layers of N heads for M images, and the labels."""

    inputs: list[Tensor]  # float32 [M, width] of each exit; widths may differ
    labels: Tensor  # int64 [M]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class HeadRows:
    train: Rows  # every image once per pass
    heldout: Rows
    test: Rows


def head_rows(
    folder: RunFolder, record: CalibrationRecord, images: ImageSet, device: torch.device, passes: int, seed: int
) -> HeadRows:
    """Run a network in evaluation mode over its training, held-out and test images; the result is on the CPU.

    Args:
        passes: over the training images, each with a new augmentation as in training; 0: one pass without any.
        seed: of the augmentation.

    Raises:
        RunError, DataError: `images` is not the set the run was trained on.
    """
    split = checked_split(folder, folder.read_description()["data"], images)
    key: dict[str, Any] = {"step": record.step, "half_weights": record.half_weights, "passes": passes, "seed": seed}
    key["test_sha256"] = images.test_sha256  # other training images fail `checked_split`; test images may change
    cache = folder.head_inputs
    if (kept := _read(cache, key)) is not None:
        return kept
    network, _ = load_trained(folder, len(record.class_names), record.half_weights, record.ensemble)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train, heldout, test = parts_of(images, split, folder.read_recipe().augmentation, device)
    draws = torch.Generator(device).manual_seed(seed)
    seen = [
        _run(network, train, lambda rows: train.augmented(rows, draws)[0], f"training images, pass {i + 1}")
        for i in range(passes)
    ] or [_run(network, train, lambda rows: train.plain(rows)[0], "training images")]
    made = HeadRows(
        Rows(
            [torch.cat(parts) for parts in zip(*(rows.inputs for rows in seen), strict=True)],
            torch.cat([rows.labels for rows in seen]),
        ),
        _run(network, heldout, lambda rows: heldout.plain(rows)[0], "held-out images"),
        _run(network, test, lambda rows: test.plain(rows)[0], "test images"),
    )
    partial = cache.with_suffix(".partial")
    torch.save({"key": key, **{name: vars(rows) for name, rows in vars(made).items()}}, partial)
    partial.replace(cache)
    return made


@torch.no_grad()
def _run(network: nn.Module, images: DeviceImages, read: Callable[[Tensor], Tensor], description: str) -> Rows:
    kept, collected = HeadInputs(network), []
    for rows in in_batches(images, description):
        network(read(rows))
        collected.append([inputs.float().cpu() for inputs in kept.take()])
    kept.remove()
    return Rows([torch.cat(parts) for parts in zip(*collected, strict=True)], images.labels.cpu())


def _read(cache: Path, key: dict[str, Any]) -> HeadRows | None:
    """Read the cache; None if it is missing, damaged, or was made with another key."""
    try:
        state = torch.load(cache, weights_only=True)
        if state.pop("key") != key:
            return None
        return HeadRows(**{name: Rows(**rows) for name, rows in state.items()})
    except Exception:  # torch raises half a dozen kinds for a damaged file
        return None
