import numpy as np
import pytest
import torch

from training.augment import DeviceImages

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def device_images(n: int = 6, height: int = 5, width: int = 7, padding: int = 2) -> tuple[np.ndarray, DeviceImages]:
    # No black pixels, so that a black border shows; random values identify the image, row and column of a pixel.
    pixels = np.random.default_rng(0).integers(1, 256, (n, height, width, 3), dtype=np.uint8)
    return pixels, DeviceImages(pixels, np.arange(n), MEAN, STD, CPU, padding)


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Reference implementation: uint8 [height, width, 3] to normalised [3, height, width]."""
    return ((pixels / 255.0 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)


def shifted(image: np.ndarray, dy: int, dx: int, flip: bool, padding: int) -> np.ndarray:
    """Reference implementation: one crop of the padded image, optionally mirrored."""
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    crop = padded[dy : dy + height, dx : dx + width]
    return crop[:, ::-1] if flip else crop


def test_without_padding_images_are_not_copied() -> None:
    """A copy of a set of photographs might not fit into memory."""
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    assert np.shares_memory(DeviceImages(pixels, np.arange(3), MEAN, STD, CPU).padded.numpy(), pixels)


def test_the_test_transform_only_normalises() -> None:
    pixels, images = device_images()
    rows = torch.tensor([4, 0, 4])
    batch, labels = images.plain(rows)
    assert batch.dtype == torch.float32
    assert labels.tolist() == [4, 0, 4]
    for got, row in zip(batch, rows.tolist(), strict=True):
        assert np.allclose(got.numpy(), normalised(pixels[row]), atol=1e-6)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_every_augmented_row_is_one_crop_of_its_own_image() -> None:
    pixels, images = device_images()
    rows = torch.arange(6).repeat(20)
    batch, labels = images.augmented(rows, torch.Generator().manual_seed(1))
    assert labels.tolist() == rows.tolist()
    assert batch.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    for got, row in zip(batch.numpy(), rows.tolist(), strict=True):
        matches = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
            if np.allclose(got, normalised(shifted(pixels[row], dy, dx, flip, 2)), atol=1e-6)
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 40  # of 50 possible crops, as every row draws its own


def test_crops_and_flips_are_uniformly_distributed() -> None:
    pixels = np.zeros((1, 9, 9, 3), np.uint8)
    pixels[0, 4, 4] = 255  # its place shows the offset ...
    pixels[0, 4, 5] = 128  # ... and the side of this one shows the flip
    images = DeviceImages(pixels, np.zeros(1, np.int64), (0, 0, 0), (1, 1, 1), CPU, padding_px=3)
    n = 7000
    batch, _ = images.augmented(torch.zeros(n, dtype=torch.int64), torch.Generator().manual_seed(5))
    brightest = batch[:, 0].flatten(1).argmax(1)
    ys, xs = brightest // 9, brightest % 9
    right = batch[torch.arange(n), 0, ys, (xs + 1).clamp(max=8)] > 0.4
    for found in (ys, xs):
        counts = torch.bincount(found, minlength=9)
        assert counts[0] == counts[8] == 0
        # 1,000 expected at each of the seven offsets; 150 is five standard deviations
        assert (counts[1:8] - n / 7).abs().max() < 150
    assert abs(right.float().mean().item() - 0.5) < 0.03
    assert abs(np.corrcoef(ys.numpy(), xs.numpy())[0, 1]) < 0.06


def test_the_same_generator_state_gives_the_same_batch() -> None:
    _, images = device_images()
    rows = torch.arange(6)
    first, second, other = (images.augmented(rows, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seed", range(3))
def test_without_padding_only_flips_remain(seed: int) -> None:
    pixels, images = device_images(padding=0)
    batch, _ = images.augmented(torch.arange(6), torch.Generator().manual_seed(seed))
    for got, image in zip(batch.numpy(), pixels, strict=True):
        assert any(np.allclose(got, normalised(x), atol=1e-6) for x in (image, image[:, ::-1]))


def a_ramp(size_px: int) -> np.ndarray:
    """An image whose red channel encodes the row and whose green channel the column."""
    ramp = np.linspace(0, 250, size_px).round().astype(np.uint8)
    image = np.zeros((1, size_px, size_px, 3), np.uint8)
    image[0, :, :, 0], image[0, :, :, 1] = ramp[:, None], ramp[None, :]
    return image


def test_resized_crops_have_areas_in_the_given_range() -> None:
    n = 400
    images = DeviceImages(a_ramp(64), np.zeros(1, np.int64), (0, 0, 0), (1, 1, 1), CPU, crop_area=(0.3, 0.6))
    batch, labels = images.augmented(torch.zeros(n, dtype=torch.int64), torch.Generator().manual_seed(1), size_px=32)
    assert batch.shape == (n, 3, 32, 32)
    assert len(labels) == n
    assert batch.is_contiguous(memory_format=torch.channels_last)
    # The step between output pixels, in image pixels, is the size of the crop divided by 32.
    height = (batch[:, 0, 31, 16] - batch[:, 0, 0, 16]) * 255 / 250 * 32 / 31
    width = (batch[:, 1, 16, 31] - batch[:, 1, 16, 0]) * 255 / 250 * 32 / 31
    flipped, area, ratio = width < 0, height * width.abs(), width.abs() / height
    assert abs(flipped.float().mean().item() - 0.5) < 0.1
    assert 0.28 < area.min() < 0.32
    assert 0.57 < area.max() < 0.62
    assert 0.72 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.37
    top, left = batch[:, 0, 0, 16], torch.minimum(batch[:, 1, 16, 0], batch[:, 1, 16, 31])
    for edge in (top, left):
        assert edge.min() < 0.05
        assert edge.max() > 0.3


def test_a_crop_of_the_whole_area_is_the_image() -> None:
    image = a_ramp(16)
    images = DeviceImages(image, np.zeros(1, np.int64), (0, 0, 0), (1, 1, 1), CPU, crop_area=(1.0, 1.0))
    batch, _ = images.augmented(torch.zeros(50, dtype=torch.int64), torch.Generator().manual_seed(2))
    # If its sides differ, the crop is clipped to the image, so the longer side is complete.
    rows = (batch[:, 0, -1, 8] - batch[:, 0, 0, 8]) * 255
    columns = (batch[:, 1, 8, -1] - batch[:, 1, 8, 0]).abs() * 255
    assert torch.all(torch.maximum(rows, columns) > 248)


def test_cutout_fills_one_square_with_the_mean_colour() -> None:
    white = np.full((1, 20, 20, 3), 255, np.uint8)
    images = DeviceImages(white, np.zeros(1, np.int64), (0.5, 0.5, 0.5), (1, 1, 1), CPU, padding_px=0, cutout_px=6)
    batch, _ = images.augmented(torch.zeros(300, dtype=torch.int64), torch.Generator().manual_seed(3))
    painted = batch[:, 0] == 0
    assert torch.equal(painted, batch[:, 1] == 0)
    rows, columns = painted.any(2).sum(1), painted.any(1).sum(1)
    assert torch.equal(painted.sum((1, 2)), rows * columns)  # a rectangle: a square, clipped at the border
    assert rows.max() == columns.max() == 6
    assert rows.min() == columns.min() == 3


def test_cutmix_pastes_a_rectangle_and_mixes_labels_by_area() -> None:
    n = 8
    pixels = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None] * 30, (n, 20, 16, 3)).copy()
    images = DeviceImages(pixels, np.arange(n), (0, 0, 0), (1, 1, 1), CPU, cutmix=1.0, n_classes=n + 1)
    shares = []
    for seed in range(200):
        batch, labels = images.augmented(torch.arange(n), torch.Generator().manual_seed(seed))
        assert labels.shape == (n, n + 1)
        assert torch.allclose(labels.sum(1), torch.ones(n))
        of_pixels = torch.stack([(batch[:, 0] * 255 / 30).round() == k for k in range(n)], -1).float().mean((1, 2))
        assert torch.allclose(labels[:, :n], of_pixels, atol=1e-6)  # labels are shares of pixels by their source image
        own = labels.diagonal()
        shares.append(1 - float(own.min()))
    # The side is uniform, the rectangle is clipped at the border: areas of almost all sizes occur.
    assert min(shares) < 0.05
    assert max(shares) > 0.8
    assert 0.25 < np.mean(shares) < 0.45


def test_cutmix_applies_to_its_share_of_the_batches() -> None:
    images = DeviceImages(
        np.zeros((4, 8, 8, 3), np.uint8), np.arange(4), (0,) * 3, (1,) * 3, CPU, cutmix=0.3, n_classes=4
    )
    draws = torch.Generator().manual_seed(0)
    mixed = [images.augmented(torch.arange(4), draws)[1].dim() == 2 for _ in range(1000)]
    assert 0.25 < np.mean(mixed) < 0.35
