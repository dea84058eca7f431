"""Starts a run from a bundle's weights: to train the network further, or to fine-tune it on other images."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.bundle import WEIGHTS, BundleError, load_bundle
from models.manifest import Manifest
from training.checkpoint import RunError
from training.image_set import ImageSet, Split
from training.unpacking import read_weights


def identity_of(bundle: Path) -> str:
    """Name and version of a bundle, as recorded in a run that starts from it.

    Raises:
        RunError: there is no bundle, or it is damaged.
    """
    manifest = _manifest_of(bundle)
    return f"{manifest.name} {manifest.version}"


def training_of(bundle: Path) -> dict[str, Any]:
    """The training record in a bundle's manifest, kept in the run that starts from it.

    Raises:
        RunError: there is no bundle, or it is damaged.
    """
    return dict(_manifest_of(bundle).training)


def start_from(bundle: Path, network: nn.Module, images: ImageSet, split: Split) -> None:
    """Load a bundle's weights into a network; with other classes, the classifier layers keep their fresh weights.

    Raises:
        RunError: the networks differ, or the bundle's was trained on images that this run would hold out.
    """
    manifest = _manifest_of(bundle)
    listed = manifest.training.get("images_sha256")  # missing in older bundles
    is_same_set = images.sha256 == (listed or images.sha256)
    may_be_same = manifest.data.name == images.name or listed == images.sha256  # a folder may have been renamed
    if may_be_same and not (is_same_set and manifest.data.split_sha256 == split.sha256):
        raise RunError(
            f"--from {bundle}: its network was trained on images that this run would hold out; use the bundle's own "
            f"images and split: --seed {manifest.training.get('seed')} --set "
            f"held_out_images={manifest.data.heldout_images}. If {images.name!r} is another image set than "
            f"the bundle's, give {'the files other names' if is_same_set else 'their folder another name'}"
        )
    wanted = network.state_dict()
    given = read_weights(bundle / WEIGHTS)
    other_classes = list(images.class_names) != manifest.class_names
    of_training = ("boosting.", "gates.")  # not in a bundle
    for name, value in wanted.items():
        if name.startswith(of_training) or (other_classes and ".classifier." in name):
            given[name] = value
    misfits = [name for name in wanted.keys() | given.keys() if _shape(wanted, name) != _shape(given, name)]
    if misfits:
        raise RunError(
            f"--from {bundle}: not the network of this recipe ({len(misfits)} weights differ, e.g. {min(misfits)}); "
            "give the recipe that the bundle was trained with, or one with the same [network]"
        )
    network.load_state_dict({name: value.to(wanted[name].dtype) for name, value in given.items()})


def _manifest_of(bundle: Path) -> Manifest:
    try:
        return load_bundle(bundle).manifest
    except BundleError as error:
        raise RunError(f"--from: {error}") from error


def _shape(weights: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None
