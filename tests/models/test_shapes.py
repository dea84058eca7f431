"""Shapes that are computed once for equal layers equal those of each layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cost import measure_cost
from models.shapes import without_data


def both_ways(images: Tensor) -> list[Tensor]:
    """Equal layers, layers that differ in one attribute, and one that is modified in place."""
    weight, wider = images.new_empty(3, 3, 3, 3), images.new_empty(5, 3, 3, 3)
    one, two = (F.conv2d(images, weight, padding=1) for _ in range(2))
    three, four = F.conv2d(images, wider, padding=1), F.conv2d(images, weight, stride=2, padding=1)
    normal = F.batch_norm(one, images.new_empty(3), images.new_empty(3))
    last = F.batch_norm(two.to(memory_format=torch.channels_last), images.new_empty(3), images.new_empty(3))
    sizes = [F.interpolate(four, size=size, mode="bilinear", align_corners=True) for size in (8, (8, 8), (9, 7))]
    return [one, two.relu_(), three, four, normal, last, *sizes, F.interpolate(four, scale_factor=2.0)]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_cached_shapes_equal_the_layers_output_shapes(device: str) -> None:
    images = torch.zeros(2, 3, 8, 8)
    with without_data(images.to(device)):
        found = both_ways(torch.empty(2, 3, 8, 8, device=device))
    for here, there in zip(found, both_ways(images), strict=True):
        assert here.shape == there.shape
        assert here.stride() == there.stride()
        assert (here.dtype, here.device.type) == (there.dtype, device)
    assert len({id(value) for value in found}) == len(found)


def test_equal_layers_are_computed_once() -> None:
    calls = []
    images = torch.empty(1, 3, 8, 8, device="meta")

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.extend([func] if func is F.interpolate else [])
            return func(*args, **(kwargs or {}))

    with Counting(), without_data(images):
        for size in (4, 4, 16, 4, 16):
            F.interpolate(images, size=size)
    assert len(calls) == 2


def test_a_mismatched_layer_fails_after_matching_ones() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3), nn.Conv2d(4, 3, 3)])
            self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

        def forward(self, images: Tensor) -> list[Tensor]:
            first = self.convs[0](images)
            last = self.convs[2](self.convs[1](first))
            return [head(x.mean((2, 3))) for head, x in zip(self.heads, (first, last), strict=True)]

    with torch.device("meta"), pytest.raises(ValueError, match="the network fails on images"):
        measure_cost(Fails(), 8)
