"""SYNTHETIC images for `own_network`: simple shapes, drawn here, so that nothing need be downloaded."""

import numpy as np
from numpy.typing import NDArray

from training.image_set import ImageSet

SHAPES = ["disc", "ring", "square", "triangle", "cross", "bars"]


def draw_shapes(n_images: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw turned, moved, noisy shapes: images [n_images, 32, 32, 3] and their labels. Some are hard to see."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(SHAPES), n_images)
    angle, size = rng.uniform(0, 2 * np.pi, (n_images, 1, 1)), rng.uniform(7, 13, (n_images, 1, 1))
    centre = rng.uniform(12, 20, (2, n_images, 1, 1))
    down, right = np.mgrid[0:32, 0:32]
    x, y = (right - centre[0]) / size, (down - centre[1]) / size
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    radius, square = np.hypot(x, y), np.maximum(np.abs(x), np.abs(y))
    inside = np.stack(
        [
            radius < 0.9,
            (radius < 1.0) & (radius > 0.6),
            square < 0.8,
            np.maximum(-y, np.abs(x) * 0.87 + y * 0.5) < 0.55,
            (square < 1.0) & (np.minimum(np.abs(x), np.abs(y)) < 0.28),
            (square < 0.9) & (np.abs(np.abs(x) - 0.6) < 0.28),
        ]
    )[labels, np.arange(n_images)]
    ground = rng.uniform(60, 195, (n_images, 1, 1, 3))
    contrast = rng.uniform(15, 90, (n_images, 1, 1, 1)) * rng.choice([-1, 1], (n_images, 1, 1, 3))
    noise = rng.uniform(5, 35, (n_images, 1, 1, 1)) * rng.normal(size=(n_images, 32, 32, 3))
    return np.clip(ground + contrast * inside[..., None] + noise, 0, 255).astype(np.uint8), labels


def synthetic_shapes(n_images: int) -> ImageSet:
    return ImageSet(
        "synthetic shapes",
        *draw_shapes(n_images, seed=1),
        *draw_shapes(max(100, n_images // 5), seed=2),
        class_names=SHAPES,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
