"""Half precision in the torch runner: exact images and biases, and weights rounded with the least error."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.normalise import Normalise
from service.runners.torch_cuda.device import Host
from service.runners.torch_cuda.exact_images import ExactImages, use_exact_images, use_exact_weights
from service.runners.torch_cuda.kernels import GREY_LEVEL, Kernels, Ways
from service.runners.torch_cuda.network import cut, lower
from service.runners.torch_cuda.rounding import rounded, scales_for
from service.runners.torch_cuda.runner import TorchCudaRunner
from service.runners.torch_cuda.widening import widen
from tests.bundles import IMAGE_SIZE_PX, MEAN, STD, random_images, tiny_network
from tests.models.networks import randomise_statistics
from tests.service.runners.test_runner_torch import tiny_ranet
from tests.service.runners.test_runner_torch_kernels import NETWORKS, run_stages
from tests.service.slotted import close

SHAPE = (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)
CPU = torch.device("cpu")


class OneConvolution(nn.Module):
    """A network of one convolution, whose outputs are the logits."""

    def __init__(self, size: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, size, 2, padding)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.conv(images).flatten(1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("size", [3, 7])
def test_images_are_exact_in_half_precision(size: int, dtype: torch.dtype) -> None:
    """Around them, where zeros are normalised pixels, neither."""
    torch.manual_seed(1)
    network = OneConvolution(size, padding=size // 2)
    pixels = torch.from_numpy(random_images(4, seed=1))
    with torch.inference_mode():
        expected = network.double()(Normalise(MEAN, STD).double()(pixels))[0]
        [stage] = cut(network.float(), SHAPE, MEAN, STD)
        weight = network.conv.weight.clone()
        use_exact_images(stage, dtype, Kernels())
        use_exact_weights(stage, dtype)
        [images] = [module for module in stage.modules() if isinstance(module, ExactImages)]
        given = images(pixels)
        [conv] = [module for module in stage.modules() if isinstance(module, nn.Conv2d)]
        found = F.conv2d(given.double(), conv.weight.to(dtype).double(), conv.bias.double(), 2, size // 2).flatten(1)
    assert given.dtype == dtype
    assert torch.equal(given[:, :3] / GREY_LEVEL, (pixels.permute(0, 3, 1, 2) - images.levels[:, None, None]).to(dtype))
    assert torch.equal(network.conv.weight, weight)  # others may use it
    rounded = torch.finfo(dtype).eps * float(expected.abs().max())
    assert (found - expected).abs().max() < rounded * (0.01 if size == 3 else 1)  # weights in two parts, or one


def test_images_with_other_readers_are_normalised() -> None:
    class Pooled(OneConvolution):
        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return super().forward(F.avg_pool2d(images, 2))

    network = Pooled(3, 1)
    pixels = torch.from_numpy(random_images(2, seed=2))
    with torch.inference_mode():
        expected = network(Normalise(MEAN, STD)(pixels))[0]
        [stage] = lower(cut(network, SHAPE, MEAN, STD), CPU, torch.float16, ways=Ways.exact_alone())
        found = run_stages([stage], pixels)[0][0]
    assert not [module for module in stage.modules() if isinstance(module, ExactImages)]
    assert torch.allclose(found.float(), expected, atol=0.01)


@NETWORKS
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_biases_are_exact_in_half_precision(
    network: Callable[[], nn.Module], multiple: int, dtype: torch.dtype
) -> None:
    made = randomise_statistics(network())
    pixels = torch.from_numpy(random_images(3, seed=3))
    with torch.inference_mode():
        whole = made(Normalise(MEAN, STD)(pixels))
        stages = lower(cut(made, SHAPE, MEAN, STD), CPU, torch.float32)
        before = biases(stages)
        widen(stages, multiple, dtype)
        logits = run_stages(stages, pixels)[0]
    for found, expected in zip(logits, whole, strict=True):
        close(found.numpy(), expected.numpy())
    assert sum(not is_exact(bias, dtype) for bias in before) > len(before) / 2
    assert all(is_exact(bias, dtype) for bias in biases(stages))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("side", [1, 3])
def test_weights_are_rounded_to_the_least_output_error(side: int, dtype: torch.dtype) -> None:
    """On smooth maps like those after a ReLU, the error of a convolution's output is much smaller."""
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn((32, 24, side, side), generator=generator), torch.randn(32, generator=generator)
    coarse = torch.randn((16, 24, 4, 4), generator=generator).relu()
    maps = F.interpolate(coarse, size=(16, 16), mode="bilinear").double()

    def off(scales: torch.Tensor, round_to: Callable[[torch.Tensor, torch.dtype], torch.Tensor]) -> float:
        given = weight * scales[:, None, None, None]
        stored = round_to(given, dtype)
        assert torch.equal(stored.to(dtype).float(), stored.float())
        assert ((stored - given).abs() <= torch.finfo(dtype).eps * given.abs()).all()  # a neighbour
        found = F.conv2d(maps, stored.double() / scales[:, None, None, None])
        return float((found - F.conv2d(maps, weight.double())).square().mean().sqrt())

    scales = scales_for(weight, bias, dtype)
    assert is_exact(bias * scales, dtype)
    plainly = off(torch.ones(32), torch.Tensor.to)
    assert off(scales, torch.Tensor.to) < 0.8 * plainly
    assert off(scales, rounded) < (0.35 if side == 3 else 0.6) * plainly
    assert torch.equal(rounded(weight.to(dtype).float(), dtype), weight.to(dtype).float())
    assert torch.equal(scales_for(weight, None, dtype), torch.ones(32))
    assert torch.equal(scales_for(weight, bias, torch.float32), torch.ones(32))


@pytest.mark.parametrize("network", [tiny_network, tiny_ranet])
def test_means_of_maps_are_not_rounded_again(network: Callable[[], nn.Module]) -> None:
    stages = lower(cut(network().eval(), SHAPE, MEAN, STD), CPU, torch.float16, ways=Ways.exact_alone())
    made = []
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Linear)):
                module.register_forward_hook(lambda _, given, found: made.extend([given[0].dtype, found.dtype]))
    run_stages(stages, torch.from_numpy(random_images(2, seed=6)))
    assert len(made) >= 2 * len(stages)
    assert set(made) == {torch.float32}


@pytest.mark.parametrize("network", [tiny_network, tiny_ranet])
def test_stages_in_half_precision_have_both(network: Callable[[], nn.Module]) -> None:
    made = randomise_statistics(network())
    exact = lower(cut(made, SHAPE, MEAN, STD), CPU, torch.float32)
    use_exact_images(exact[0], torch.float16, Kernels())
    widen(exact, 1, torch.float16)
    use_exact_weights(exact[0], torch.float16)
    stages = lower(cut(made, SHAPE, MEAN, STD), CPU, torch.float16, ways=Ways.exact_alone())
    expected, found = ({name: conv for s in some for name, conv in convolutions(s)} for some in (exact, stages))
    assert not any(node.target is torch.index_select for stage in stages for node in stage.graph.nodes)
    assert len(expected) == len(found) > 5
    for name, conv in expected.items():
        assert torch.equal(found[name].weight, rounded(conv.weight.detach(), torch.float16).half())
        assert torch.equal(found[name].bias, conv.bias.half())


@pytest.mark.parametrize("ways", [Ways.none(), None], ids=["the bar to beat", "as served"])
def test_the_plain_torch_network_is_unchanged_and_the_served_one_is_not(ways: Ways | None) -> None:
    """The baseline that the engine is compared with must not pay for the engine's changes."""
    made = randomise_statistics(tiny_network())
    runner = TorchCudaRunner(made, SHAPE, MEAN, STD, None, 2, 8, Host(), torch.float16, 1, ways=ways)
    first = list(runner.stages[0].modules())
    assert any(isinstance(module, Normalise) for module in first) == (ways is not None)
    assert any(isinstance(module, ExactImages) for module in first) == (ways is None)
    plain = {
        name: conv for s in lower(cut(made, SHAPE, MEAN, STD), CPU, torch.float32) for name, conv in convolutions(s)
    }
    found = {name: conv for s in runner.stages for name, conv in convolutions(s)}
    same = [name in found and torch.equal(found[name].weight, conv.weight.half()) for name, conv in plain.items()]
    assert all(same) if ways else not any(same)


def convolutions(stage: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(name, module) for name, module in stage.named_modules() if isinstance(module, nn.Conv2d)]


def biases(stages: list[nn.Module]) -> list[torch.Tensor]:
    """Of convolutions, those that are no numbers left out."""
    found = [conv for stage in stages for _, conv in convolutions(stage)]
    return [conv.bias[conv.bias != 0] for conv in found if conv.bias is not None and conv.groups == 1]


def is_exact(bias: torch.Tensor, dtype: torch.dtype) -> bool:
    """But for float32's own rounding, and for numbers so small that they are rounded by next to nothing."""
    rounded, tiny = bias.to(dtype).float(), torch.finfo(dtype).smallest_normal
    return torch.allclose(torch.where(bias.abs() < tiny, bias, rounded), bias, rtol=1e-6, atol=0.0)
