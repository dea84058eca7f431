"""Images on the training device, where they are augmented in batches."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of random resized crops


class DeviceImages:
    """Labelled images kept on a device as uint8; batches of them are normalised floats.

    Args:
        images: uint8 [images, height, width, 3].
        labels: int64 [images].
        mean, std: per channel, of images scaled to [0, 1].
        padding_px: black border that random crops may extend into (CIFAR: 4); 0 for no crops.
        crop_area: smallest and largest share of an image's area that a random resized crop keeps (photographs: 0.35 to
            1, ImageNet's usual 0.08 to 1); None for crops without resizing.
        cutout_px: side of a square around a random pixel that gets the mean colour (DeVries and Taylor 2017).
        cutmix: share of batches in which a rectangle of every image comes from another one (CutMix, Yun et al. 2019).
        n_classes: number of classes; needed for `cutmix` only.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        padding_px: int = 0,
        crop_area: tuple[float, float] | None = None,
        cutout_px: int = 0,
        cutmix: float = 0.0,
        n_classes: int = 0,
    ) -> None:
        self.labels = torch.from_numpy(labels).to(device)
        self.height_px, self.width_px = images.shape[1:3]
        self.padding_px = padding_px
        self.crop_area = crop_area
        self.cutout_px = cutout_px
        self.cutmix, self.n_classes = cutmix, n_classes
        self.padded = torch.from_numpy(images).to(device)
        if padding_px:  # padding by 0 would copy the images
            self.padded = functional.pad(self.padded, (0, 0, padding_px, padding_px, padding_px, padding_px))
        self.scale = (1.0 / (255.0 * torch.tensor(std, device=device))).float()
        self.shift = (-torch.tensor(mean, device=device) / torch.tensor(std, device=device)).float()

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The test transform: only normalises. Returns float32 [rows, 3, height, width] and labels [rows]."""
        p = self.padding_px
        images = self.padded[rows, p : p + self.height_px, p : p + self.width_px]
        return self._normalised(images), self.labels[rows]

    def augmented(self, rows: Tensor, generator: torch.Generator, size_px: int | None = None) -> tuple[Tensor, Tensor]:
        """The training transform: a random crop of every row, and a horizontal flip with probability 0.5.

        The crop is taken from the padded image or, with `crop_area`, is a part of the image resized to `size_px`
        (default: the image's size). Returns normalised float32 [rows, 3, height, width] and labels [rows]; if images
        were mixed, the labels are float32 [rows, classes], the share of every class.
        """
        if self.crop_area is not None:
            images = self._resized_crops(rows, generator, size_px or self.height_px)
        else:
            images = self._shifted_crops(rows, generator)
        if self.cutout_px:
            images *= self._outside_cutout(images, generator)
        labels = self.labels[rows]
        return self._mixed(images, labels, generator) if self.cutmix else (images, labels)

    def _shifted_crops(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        n, device = len(rows), self.padded.device
        offsets = torch.randint(0, 2 * self.padding_px + 1, (2, n, 1), generator=generator, device=device)
        flips = torch.randint(0, 2, (n, 1), generator=generator, device=device, dtype=torch.bool)
        ys = offsets[0] + torch.arange(self.height_px, device=device)
        columns = torch.arange(self.width_px, device=device)
        xs = offsets[1] + torch.where(flips, columns.flip(0), columns)
        return self._normalised(self.padded[rows[:, None, None], ys[:, :, None], xs[:, None, :]])

    def _resized_crops(self, rows: Tensor, generator: torch.Generator, size_px: int) -> Tensor:
        """Crops of random area and aspect ratio, of square images, resized bilinearly. Sides are limited to theirs."""
        assert self.crop_area is not None
        device = self.padded.device
        area, ratio, left, top, flip = torch.rand((5, len(rows)), generator=generator, device=device)
        area = self.crop_area[0] + (self.crop_area[1] - self.crop_area[0]) * area
        low, high = (math.log(r) for r in ASPECT_RATIOS)
        ratio = torch.exp(low + (high - low) * ratio)
        width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
        # In grid_sample's coordinates, the image extends from -1 to 1.
        affine = torch.zeros(len(rows), 2, 3, device=device)
        affine[:, 0, 0] = torch.where(flip < 0.5, -width, width)
        affine[:, 0, 2] = (2 * left - 1) * (1 - width)
        affine[:, 1, 1] = height
        affine[:, 1, 2] = (2 * top - 1) * (1 - height)
        grid = functional.affine_grid(affine, [len(rows), 3, size_px, size_px], align_corners=False)
        # grid_sample is fastest on contiguous float32 planes. `padded` has no border here: see `Augmentation`.
        planes = self.padded[rows].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        crops = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
        return self._normalised(crops.permute(0, 2, 3, 1).contiguous())

    def _outside_cutout(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A mask [rows, 1, height, width]: 0 inside each image's square, 1 outside. Images are 0 at the mean colour."""
        inside = []
        for axis in (2, 3):
            n_px = images.shape[axis]
            centre = torch.randint(0, n_px, (len(images), 1), generator=generator, device=images.device)
            distance = torch.arange(n_px, device=images.device) - centre + self.cutout_px // 2
            inside.append((distance >= 0) & (distance < self.cutout_px))
        return (~(inside[0][:, :, None] & inside[1][:, None, :])).unsqueeze(1).float()

    def _mixed(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """CutMix with alpha = 1: one rectangle for the batch, whose share of the area is uniform in [0, 1], clipped to
        the image; every row takes it from a row of a random permutation."""
        device, (height_px, width_px) = images.device, images.shape[2:]
        drawn = torch.rand(4, generator=generator, device=device).tolist()
        partners = torch.randperm(len(labels), generator=generator, device=device)
        if drawn[0] >= self.cutmix:
            return images, labels
        side = math.sqrt(drawn[1])
        (top, bottom), (left, right) = (
            (max(0, round((centre - side / 2) * n_px)), min(n_px, round((centre + side / 2) * n_px)))
            for centre, n_px in ((drawn[2], height_px), (drawn[3], width_px))
        )
        images[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
        share = (bottom - top) * (right - left) / (height_px * width_px)
        own = functional.one_hot(labels, self.n_classes).float()
        return images, torch.lerp(own, own[partners], share)

    def _normalised(self, images: Tensor) -> Tensor:
        # [rows, height, width, 3] viewed as [rows, 3, height, width] is already channels-last: nothing is copied.
        return (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)
