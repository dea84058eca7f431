"""Reads the image set that `--data` names, in any known form."""

from pathlib import Path

from training.cifar100 import PARTS, read_parts, read_strips, read_tar
from training.image_folder import found_in, holds_classes, read_image_folder
from training.image_set import DataError, ImageSet


def load_image_set(path: Path, image_size_px: int = 224) -> ImageSet:
    """Read the image set at `path`, in any known form.

    These are CIFAR-100 as the official `cifar-100-python.tar.gz`, its unpacked folder, or a folder of lossless WebP
    strips (`cifar100-images-*.zip` with `cifar100-labels.npz`); and a folder of pictures, read at `image_size_px`
    (shorter side resized, centre cropped), see `training.image_folder`.

    Raises:
        DataError: there is no image set of a known form, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give CIFAR-100's tar.gz or folder, or an image folder")
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return read_tar(path)
    for folder in (path, path / "cifar-100-python"):
        if (folder / "train").is_file() and (folder / "meta").is_file():
            return read_parts({part: (folder / part).read_bytes() for part in PARTS}, folder)
    tar = path / "cifar-100-python.tar.gz"
    if tar.is_file():
        return read_tar(tar)
    if (path / "cifar100-labels.npz").is_file():
        return read_strips(path)
    if path.is_dir() and ((path / "train").is_dir() or holds_classes(path)):
        return read_image_folder(path, image_size_px)
    raise DataError(
        f"{path}: not an image set in a known form. Expected cifar-100-python.tar.gz, its folder (train, test, "
        "meta), or an image folder with train/CLASS/ and val/CLASS/, or with CLASS/ alone" + found_in(path)
    )
