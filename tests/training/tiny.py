"""A small image set in CIFAR-100's file format, and a recipe that trains on it in a second.

The network has two exits and few layers, as both determine the time of an export.
"""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.data import load_image_set
from training.image_set import ImageSet
from training.recipe import Recipe

CLASS_NAMES = ["red", "green", "blue", "grey"]
COLOURS = np.array([[200, 80, 80], [80, 200, 80], [80, 80, 200], [128, 128, 128]])
N_TRAIN, N_TEST, N_HELDOUT = 104, 60, 40

RECIPE = """
description = "tiny"
held_out_images = 40

[network]
architecture = "msdnet"

[network.arguments]
config = "C-batch-4"
n_blocks = 2
base = 1
step = 1
n_channels = 4
growth_rate = 4
growth_factors = [1, 1, 2]
bottleneck_factors = [1, 1, 2]
bottleneck = false

[optimisation]
epochs = 2
batch_rows = 16
learning_rate = 0.1
schedule = "cosine"

[augmentation]
crop_padding_px = 2
"""


def recipe(n_exits: int = 2, **sections: dict[str, Any]) -> Recipe:
    """The tiny recipe with some fields changed: `recipe(optimisation={"epochs": 1})`."""
    import tomllib

    values = tomllib.loads(RECIPE)
    values["network"]["arguments"]["n_blocks"] = n_exits
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return Recipe.model_validate(values)


def write_recipe(path: Path, epochs: int = 2, n_exits: int = 2) -> Path:
    changed = RECIPE.replace("epochs = 2", f"epochs = {epochs}").replace("n_blocks = 2", f"n_blocks = {n_exits}")
    path.write_text(changed)
    return path


def coloured(n_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images [n, 32, 32, 3] whose mean colour depends on their class, and the labels."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n_images) % len(CLASS_NAMES)
    pixels = COLOURS[labels][:, None, None] + draw.normal(0, 60, (n_images, 32, 32, 3))
    return pixels.clip(0, 255).astype(np.uint8), labels.astype(np.int64)


def official_parts(n_train: int = N_TRAIN, n_test: int = N_TEST) -> dict[str, bytes]:
    """The files train, test and meta as pickled by Python 2: byte keys, channels first, numpy's old module names."""
    contents: dict[str, Any] = {"meta": {b"fine_label_names": [name.encode() for name in CLASS_NAMES]}}
    for part, n_images, seed in (("train", n_train, 1), ("test", n_test, 2)):
        images, labels = coloured(n_images, seed)
        flat = np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(n_images, -1))
        contents[part] = {b"data": flat, b"fine_labels": labels.tolist(), b"coarse_labels": [0] * n_images}
    return {
        part: pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core")
        for part, content in contents.items()
    }


def write_tar(path: Path, parts: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for part, content in parts.items():
            member = tarfile.TarInfo(f"cifar-100-python/{part}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    for part, content in official_parts().items():
        (path / part).write_bytes(content)
    return path


def write_images(folder: Path) -> Path:
    """Write 150 images of 32 px into a folder per class; when read, about 120 are for training and 30 for testing."""
    for row, (image, label) in enumerate(zip(*coloured(150, 1), strict=True)):
        of_class = folder / CLASS_NAMES[label]
        of_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(of_class / f"{row}.png")
    return folder


def image_set(folder: Path) -> ImageSet:
    return load_image_set(write_folder(folder))
