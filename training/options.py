"""Options that several commands of `python -m training` share, and what they resolve to."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training.errors import TrainingError

if TYPE_CHECKING:
    import torch

    from training.checkpoint import RunFolder
    from training.image_set import ImageSet


def shipped(folder: str) -> str:
    """The names of the TOML files in a folder of this package, for help texts."""
    return ", ".join(sorted(file.stem for file in (Path(__file__).parent / folder).glob("*.toml")))


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"

    def resolve(self) -> "torch.device":
        import torch

        from training.checkpoint import RunError

        found = torch.cuda.is_available()
        if self is Device.cuda and not found:
            raise RunError("--device cuda: no GPU is visible to torch; omit the option, or install torch with CUDA")
        return torch.device("cuda" if found and self is not Device.cpu else "cpu")


MAX_SEED = 2**31 - 1  # accepted by every random generator
DEFAULT_SIZE_PX = 224  # side at which an image folder is read
RunArgument = Annotated[Path, typer.Argument(help="Folder of the run.")]
DataOption = Annotated[
    Path, typer.Option("--data", envvar="EXITSERVE_DATA", help="CIFAR-100 archive or folder, or an image folder.")
]
ImageSizeOption = Annotated[
    int, typer.Option("--image-size", min=8, help="Side in pixels at which an image folder is read.")
]
DeviceOption = Annotated[Device, typer.Option(help="auto: a GPU if there is one.")]
HeadsStart = Literal["kept", "trained", "fresh"]  # of `gate`; here, as its command imports no torch
GatesOn = Literal["heldout", "training"]


def typed(*words: object) -> str:
    """A command of `python -m training`, quoted for a shell."""
    return "python -m training " + shlex.join(map(str, words))


def images_of(folder: "RunFolder", data: Path) -> "ImageSet":
    """Read the images of a run, at the size at which it was trained."""
    from training.data import load_image_set

    return load_image_set(data, folder.read_description()["data"].get("image_size_px", DEFAULT_SIZE_PX))


def side_px(bundle: Path) -> int:
    """The side of the images that a bundle's network takes, for reading an image folder."""
    from models.bundle import BundleError, load_bundle

    try:
        return load_bundle(bundle, verify=False).manifest.input.height_px
    except BundleError as error:
        raise TrainingError(str(error)) from error
