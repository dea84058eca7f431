"""Messages of a training run: its summary at the start, a line per epoch, and the error if it diverges."""

from collections.abc import Sequence
from itertools import pairwise

from training.augment import DeviceImages
from training.checkpoint import RunError, RunFolder
from training.image_folder import some
from training.image_set import ImageSet, Split
from training.recipe import Augmentation, Optimisation


def summary(images: DeviceImages, n_held_out: int, o: Optimisation, steps_per_epoch: int, precision: str) -> str:
    """One line before the first step."""
    return (
        f"{len(images):,} training and {n_held_out:,} held-out images of {images.n_classes} classes at "
        f"{images.height_px} px; {o.epochs} epochs of {steps_per_epoch} steps of {o.batch_rows} rows in {precision}"
    )


def classes_without(images: ImageSet, split: Split) -> list[str]:
    """Notes on classes without training images and on classes without test images, if there are any."""
    notes = []
    for part, labels, what in (
        ("training", images.train_labels[split.train], "all are held out: add images, or hold out fewer"),
        ("test", images.test_labels, "so accuracy on these is not measured"),
    ):
        present = set(labels.tolist())
        if absent := [name for label, name in enumerate(images.class_names) if label not in present]:
            notes.append(f"no {part} image in: {some(absent)} ({what})")
    return notes


def epoch_line(epoch: int, epochs: int, losses: Sequence[float], accuracy: Sequence[float], rest: str) -> str:
    """The line of an epoch: mean loss over the exits, and held-out accuracy by exit, in % (`accuracy`: 0 to 1)."""
    percent = " ".join(f"{100 * x:.1f}" for x in accuracy)
    loss = sum(losses) / len(losses)
    return f"epoch {epoch} of {epochs}: loss {loss:.3f}, held-out top-1 per exit {percent}; {rest}"


def speed(images_per_s: float, images_left: float) -> str:
    return f"{images_per_s:.0f} images/s, {images_left / images_per_s / 60:.0f} min left"


def images_left(augmentation: Augmentation, step: int, total_steps: int, rows: float, size_px: int) -> float:
    """Images still to train on, in units of images of the latest step's size: an image counts by its pixels.

    Args:
        rows: mean images per step.
        size_px: of all images, unless the recipe has `sizes_px`.
    """
    sizes = augmentation.sizes_px or [size_px]
    now = sizes[max(0, step - 1) * len(sizes) // total_steps]
    parts = [total_steps * i / len(sizes) for i in range(len(sizes) + 1)]
    left = (max(0.0, end - max(step, start)) for start, end in pairwise(parts))
    return rows * sum(steps * (size / now) ** 2 for steps, size in zip(left, sizes, strict=True))


def diverged(folder: RunFolder, step: int, total_steps: int, learning_rate: float) -> RunError:
    """The error of a run whose loss or weights are no longer finite."""
    kept = "the last checkpoint is kept" if folder.checkpoint.is_file() else "nothing was saved"
    return RunError(
        f"{folder.path}: at step {step} of {total_steps} the loss or the weights are no longer finite; {kept}. "
        f"Train into another folder at a lower learning rate: --set optimisation.learning_rate={learning_rate / 3:.2g}"
    )
