import numpy as np
import pytest
import torch

from training.augment import DeviceImages

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def device_images(n: int = 6, height: int = 5, width: int = 7, padding: int = 2) -> tuple[np.ndarray, DeviceImages]:
    # Bright throughout, so that a black border is seen; every pixel names its image, row and column.
    pixels = np.random.default_rng(0).integers(1, 256, (n, height, width, 3), dtype=np.uint8)
    return pixels, DeviceImages(pixels, np.arange(n), MEAN, STD, CPU, padding)


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Slowly: [height, width, 3] of bytes to [3, height, width]."""
    return ((pixels / 255.0 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)


def shifted(image: np.ndarray, dy: int, dx: int, flip: bool, padding: int) -> np.ndarray:
    """Slowly: one crop of the padded image, mirrored or not."""
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    crop = padded[dy : dy + height, dx : dx + width]
    return crop[:, ::-1] if flip else crop


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
    assert len(seen) > 40  # of 50 crops: rows draw for themselves


def test_crops_and_flips_are_drawn_evenly() -> None:
    pixels = np.zeros((1, 9, 9, 3), np.uint8)
    pixels[0, 4, 4] = 255  # where it lands tells the offset ...
    pixels[0, 4, 5] = 128  # ... and on which side this one is, the flip
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
