"""Images of other sizes, scaled by the torch runner itself: like Pillow, and with the same answers."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from service.runners.torch_cuda.device import Host
from service.runners.torch_cuda.resize import cut as cut_of
from service.runners.torch_cuda.resize import resize
from service.runners.torch_cuda.runner import TorchCudaRunner
from tests.bundles import IMAGE_SIZE_PX, MEAN, STD, tiny_network
from tests.service.slotted import close, logits_of

SHAPE = (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)
SIDES = [(32, 32), (64, 64), (48, 64), (20, 61), (33, 32), (64, 1), (7, 5)]


def picture(height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(height).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def scaled(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """Scaled by Pillow, cropped around the centre."""
    (top, down, height), (left, across, width) = cut_of(image.height, image.width, (side, side))
    box = (max(left, 0.0), max(top, 0.0), min(left + across * side, width), min(top + down * side, height))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box))


@pytest.mark.parametrize(
    ("dtype", "off_by_one", "worst"), [(torch.float64, 0.001, 1), (torch.float32, 0.05, 2), (torch.float16, 0.2, 2)]
)
def test_images_are_resized_like_pillow(dtype: torch.dtype, off_by_one: float, worst: int) -> None:
    side, canvases, cuts, expected = 24, np.full((len(SIDES), 64, 64, 3), 255, np.uint8), [], []
    for canvas, (height, width) in zip(canvases, SIDES, strict=True):
        image = picture(height, width)
        canvas[:height, :width] = np.asarray(image)
        cuts.append(cut_of(height, width, (side, side)))
        expected.append(scaled(image, side))
    found = resize(torch.from_numpy(canvases), torch.tensor(cuts, dtype=torch.float64), (side, side), dtype).numpy()
    off = np.abs(found.astype(int) - np.stack(expected).astype(int))
    assert off.max() <= worst
    assert (off > 0).mean() < off_by_one


def test_images_of_other_sizes_are_sent_unscaled_and_get_the_same_answers() -> None:
    runner = TorchCudaRunner(
        tiny_network(), SHAPE, MEAN, STD, None, 8, 16, device=Host(), dtype=torch.float32, canvas_px=64
    )
    runner.warm_up()
    pictures = [picture(*sides) for sides in SIDES]
    given = [np.asarray(image) for image in pictures]
    resized = [scaled(image, 32) for image in pictures]
    for ours, theirs in zip(logits_of(runner, given), logits_of(runner, resized), strict=True):
        close(ours, theirs, tolerance=0.05)
        np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
        close(ours[:1], theirs[:1], tolerance=1e-6)  # of the network's own size: not touched
    for shape in ((65, 64, 3), (64, 65, 3), (64, 64, 4), (0, 64, 3), (64, 0, 3)):
        with pytest.raises(ValueError, match="but the network takes uint8"):
            runner.first_state(np.zeros(shape, np.uint8))
