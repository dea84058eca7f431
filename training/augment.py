"""Images on the training device, augmented there a batch at a time."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of random resized crops


class DeviceImages:
    """Labelled images resident on a device as uint8, handed out as normalised float batches.

    Args:
        images: uint8 [images, height, width, 3].
        labels: int64 [images].
        mean, std: per channel, of images scaled to [0, 1].
        padding_px: black border that random crops may reach into (CIFAR: 4); 0 crops nothing.
        crop_area: smallest and largest share of an image's area that a random resized crop keeps (photographs: 0.35 to
            1, ImageNet's usual 0.08 to 1); None crops without resizing.
        cutout_px: side of a square painted over with the mean colour, around a random pixel (DeVries and Taylor 2017).
        cutmix: share of batches in which a rectangle of every image comes from another one (CutMix, Yun et al. 2019).
        n_classes: for `cutmix`.
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
        if padding_px:  # else there's nothing to copy
            self.padded = functional.pad(self.padded, (0, 0, padding_px, padding_px, padding_px, padding_px))
        self.scale = (1.0 / (255.0 * torch.tensor(std, device=device))).float()
        self.shift = (-torch.tensor(mean, device=device) / torch.tensor(std, device=device)).float()

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The test transform: rows as they are, normalised. Returns float32 [rows, 3, height, width] and labels."""
        p = self.padding_px
        images = self.padded[rows, p : p + self.height_px, p : p + self.width_px]
        return self._normalised(images), self.labels[rows]

    def augmented(self, rows: Tensor, generator: torch.Generator, size_px: int | None = None) -> tuple[Tensor, Tensor]:
        """A random crop and a horizontal flip with probability 0.5, drawn for every row.

        The crop is out of the padded image, or with `crop_area` a part of the image resized to `size_px` (default: as
        large as the image). Returns float32 [rows, 3, height, width], normalised, and labels [rows]; where images were
        mixed, float32 [rows, classes]: the share of every class.
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
        """Crops of random area and aspect ratio, bilinear. One that would stick out of the image is cut to it."""
        assert self.crop_area is not None
        device = self.padded.device
        area, ratio, left, top, flip = torch.rand((5, len(rows)), generator=generator, device=device)
        area = self.crop_area[0] + (self.crop_area[1] - self.crop_area[0]) * area
        low, high = (math.log(r) for r in ASPECT_RATIOS)
        ratio = torch.exp(low + (high - low) * ratio) * (self.height_px / self.width_px)
        width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
        # In grid_sample's coordinates, where the image reaches from -1 to 1.
        affine = torch.zeros(len(rows), 2, 3, device=device)
        affine[:, 0, 0] = torch.where(flip < 0.5, -width, width)
        affine[:, 0, 2] = (2 * left - 1) * (1 - width)
        affine[:, 1, 1] = height
        affine[:, 1, 2] = (2 * top - 1) * (1 - height)
        grid = functional.affine_grid(affine, [len(rows), 3, size_px, size_px], align_corners=False)
        # Planes in float32 are what grid_sample is quick on; there is no padding to leave out.
        planes = self.padded[rows].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        crops = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
        return self._normalised(crops.permute(0, 2, 3, 1).contiguous())

    def _outside_cutout(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """1 outside each image's square and 0 inside, [rows, 1, height, width]; 0 is the mean colour."""
        inside = []
        for axis in (2, 3):
            n_px = images.shape[axis]
            centre = torch.randint(0, n_px, (len(images), 1), generator=generator, device=images.device)
            distance = torch.arange(n_px, device=images.device) - centre + self.cutout_px // 2
            inside.append((distance >= 0) & (distance < self.cutout_px))
        return (~(inside[0][:, :, None] & inside[1][:, None, :])).unsqueeze(1).float()

    def _mixed(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """CutMix with alpha = 1: one rectangle for the batch, of a share of the area that is uniform in [0, 1], cut to
        the image; every row takes it from the row that a shuffle puts in its place."""
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
        # [rows, height, width, 3] seen as [rows, 3, height, width] is already channels-last: nothing is copied.
        return (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)
