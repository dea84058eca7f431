"""Compares scaling by torch-cuda with Pillow's: `python -m benchmarks.gpu_resize PHOTOS.zip ...`, zips of JPEG files.

Prints the host's time for decoding with and without scaling. Then each photo is resized to a random size and classified
twice: scaled by Pillow, and by the code of the runner torch-cuda (here on the CPU, in float32 and in float16).
"""

import argparse
import io
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from models.bundle import load_bundle
from service.runners.blocks import RowState
from service.runners.onnx import OnnxRunner
from service.runners.torch_cuda.resize import cut, resize

BUNDLE = Path(__file__).resolve().parents[1] / "models/zoo/imagenette-msdnet"
SMALLEST_PX, CANVAS_PX = 150, 512
PHOTO = (500, 375)
ROUNDS = 7
Pixels = NDArray[np.uint8]


def scaled(image: Image.Image, shape: Sequence[int]) -> Pixels:
    (top, down, height), (left, across, width) = cut(image.height, image.width, shape)
    box = (max(left, 0), max(top, 0), min(left + across * shape[1], width), min(top + down * shape[0], height))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box))


def labels(runner: OnnxRunner, images: Pixels) -> NDArray[np.int64]:
    """The class that every exit predicts, [images, exits]."""
    found = []
    for start in range(0, len(images), runner.max_rows):
        rows: Sequence[RowState] = [runner.first_state(image) for image in images[start : start + runner.max_rows]]
        exits = []
        for stage in range(runner.n_stages):
            output = runner.run(stage, rows)
            exits.append(output.logits.argmax(axis=1))
            rows = output.states
        found.append(np.stack(exits, axis=1))
    return np.concatenate(found)


def compare(photos: Sequence[Image.Image]) -> None:
    runner = OnnxRunner(load_bundle(BUNDLE), 32, 1)
    shape = runner.stages[0].inputs[0].shape
    rng = np.random.default_rng(0)
    pictures = [photo.resize(tuple(rng.integers(SMALLEST_PX, CANVAS_PX + 1, 2).tolist())) for photo in photos]
    by_pillow = np.stack([scaled(picture, shape) for picture in pictures])
    expected = labels(runner, by_pillow)
    for dtype in (torch.float32, torch.float16):
        ours = []
        for picture in pictures:
            canvas = torch.zeros((1, CANVAS_PX, CANVAS_PX, 3), dtype=torch.uint8)
            canvas[0, : picture.height, : picture.width] = torch.from_numpy(np.array(picture))
            cuts = torch.tensor([cut(picture.height, picture.width, shape)], dtype=torch.float64)
            ours.append(resize(canvas, cuts, shape[:2], dtype).numpy()[0])
        off = np.abs(np.stack(ours).astype(int) - by_pillow)
        same = (labels(runner, np.stack(ours)) == expected).mean(axis=0)
        print(f"{dtype}: {(off > 0).mean():.2%} of values differ, by {off.max()} at most; the same label at", end=" ")
        print(f"each exit for {', '.join(f'{share:.2%}' for share in same)} of {len(pictures)} pictures")


def host_cost(photos: Sequence[Image.Image]) -> None:
    files = []
    for photo in photos:
        file = io.BytesIO()
        photo.resize(PHOTO).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    cost: dict[str, list[float]] = {"decoding": [], "decoding and scaling": []}
    for _ in range(ROUNDS):
        for what, milliseconds in cost.items():
            started = time.process_time()
            for data in files:
                image = Image.open(io.BytesIO(data))
                image.load()
                if what != "decoding":
                    scaled(image, (224, 224))
            milliseconds.append(1e3 * (time.process_time() - started) / len(files))
    for what, found in cost.items():
        print(f"{what}, {PHOTO} JPEG: {sorted(found)[ROUNDS // 2]:.2f} ms ({min(found):.2f} to {max(found):.2f})")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_resize", description=__doc__)
    parser.add_argument("zips", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=200)
    given = parser.parse_args(arguments)
    files = [(zipped, name) for zipped in map(zipfile.ZipFile, given.zips) for name in zipped.namelist()]
    files = [(zipped, name) for zipped, name in files if name.lower().endswith((".jpg", ".jpeg"))]
    picked = np.random.default_rng(0).choice(len(files), given.images, replace=False)
    photos = [Image.open(io.BytesIO(files[i][0].read(files[i][1]))).convert("RGB") for i in picked]
    host_cost(photos[:40])
    compare(photos)


if __name__ == "__main__":
    main(sys.argv[1:])
