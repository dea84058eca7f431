"""GPU-only parts of the torch runner: its own kernels, run here as compiled for the CPU, and maps widened for tensor
cores."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bundle import load_bundle
from models.exits import SCORES
from models.normalise import Normalise
from models.staging import Stage
from service.runners.torch_cuda import kernel_making
from service.runners.torch_cuda.device import Host
from service.runners.torch_cuda.growing import rooms
from service.runners.torch_cuda.joined import ConvRelu
from service.runners.torch_cuda.kernel_making import CHECKS, make_kernels
from service.runners.torch_cuda.kernel_sources import JUDGED, SOURCES
from service.runners.torch_cuda.kernels import Kernels, Ways
from service.runners.torch_cuda.memory import Values
from service.runners.torch_cuda.network import cut, load_network, lower
from service.runners.torch_cuda.replaced import N_CHANNELS, Concat
from service.runners.torch_cuda.runner import TorchCudaRunner
from service.runners.torch_cuda.scoring import N_NUMBERS, judge_by_torch
from service.runners.torch_cuda.small_conv import SmallConv, is_small, make_small_conv
from service.runners.torch_cuda.widening import widen
from tests.bundles import IMAGE_SIZE_PX, MEAN, REPOSITORY, STD, random_images, tiny_network
from tests.service.kernels_on_host import compile_on_host, needs_compiler
from tests.service.runners.test_runner_torch import tiny_ranet
from tests.service.slotted import close, logits_of

SHAPE = (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)
CPU = torch.device("cpu")
ON_HOST = Ways(fused=False)  # cuDNN exists only on GPUs


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    return compile_on_host(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def made(compiled: Callable[[str, str], Any]) -> Kernels:
    return Kernels({name: compiled(source, name) for name, source in SOURCES.items()})


@pytest.fixture
def on_host(compiled: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device with kernels."""
    monkeypatch.setattr(kernel_making, "compiler_for", lambda device: compiled)


def shipped() -> nn.Module:
    return load_network(load_bundle(REPOSITORY / "models/zoo/cifar100-msdnet"))


class Odd(nn.Module):
    """Operations of all kinds on maps of odd widths: those that widened maps pass, and those that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.twice = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.ReLU())
        self.by_channel = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.no_bias = nn.Conv2d(15, 7, 1, bias=False)
        self.small = nn.Sequential(nn.Conv2d(7, 6, 3, 2, 1), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(5 * 4, 10), nn.Linear(7, 10), nn.Linear(6 * 4, 10)])

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.first(images)
        x = x + self.twice(self.twice(x))
        exits = [self.heads[0](F.adaptive_avg_pool2d(x, 2).flatten(1))]
        both = torch.cat([x, self.twice(x)], 1)
        three = torch.cat([x.sigmoid(), self.by_channel(both)], 1)
        narrow = self.no_bias(three)
        exits.append(self.heads[1](narrow.mean((2, 3))))
        last = F.interpolate(self.small(narrow), narrow.shape[2:], mode="bilinear", align_corners=True)
        exits.append(self.heads[2](nn.functional.adaptive_avg_pool2d(last, 2).flatten(1)) + exits[1])
        return exits


def odd() -> nn.Module:
    torch.manual_seed(0)
    return Odd().eval()


NETWORKS = pytest.mark.parametrize(
    "network", [tiny_network, tiny_ranet, shipped, odd], ids=["msdnet", "ranet", "shipped", "odd"]
)


def run_stages(stages: list[Stage], pixels: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    state, logits = {"images": pixels}, []
    for stage in stages:
        outputs = stage(*(state[name] for name in stage.inputs))
        state.update(zip(stage.outputs, outputs, strict=True))
        logits.append(outputs[0])
    return logits, {name: value for name, value in state.items() if value.ndim == 4 and name != "images"}


# --- widened maps -------------------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("multiple", [8, 16])
def test_widened_stages_give_the_networks_answers(network: Callable[[], nn.Module], multiple: int) -> None:
    made = network()
    pixels = torch.from_numpy(random_images(3, seed=9))
    with torch.inference_mode():
        whole = made(Normalise(MEAN, STD)(pixels))
        stages = lower(cut(made, SHAPE, MEAN, STD), CPU, torch.float32)
        plain_maps = run_stages(stages, pixels)[1]
        widen(stages, multiple)
        logits, maps = run_stages(stages, pixels)
    for found, expected in zip(logits, whole, strict=True):
        close(found.numpy(), expected.numpy())
    convolutions = [m for stage in stages for m in stage.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert all(conv.out_channels % multiple == 0 for conv in convolutions)
    for name, value in maps.items():  # values between stages are the same, with zeros in between
        assert value.shape[1] >= plain_maps[name].shape[1]
        assert value.abs().sum() == pytest.approx(float(plain_maps[name].abs().sum()), rel=1e-4)
    if network is not odd:  # no map is narrowed again
        assert all(value.shape[1] % multiple == 0 for value in maps.values())
        assert not any(node.target is torch.index_select for stage in stages for node in stage.graph.nodes)


def test_maps_that_are_wide_enough_are_unchanged() -> None:
    with torch.inference_mode():
        stages = lower(cut(tiny_network(), SHAPE, MEAN, STD), CPU, torch.float32)
        before = [[node.target for node in stage.graph.nodes] for stage in stages]
        widen(stages, 1)
    assert before == [[node.target for node in stage.graph.nodes] for stage in stages]


# --- kernels ------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_kernel_equals_torch(name: str, compiled: Callable[[str, str], Any]) -> None:
    torch.manual_seed(0)
    CHECKS[name](Kernels({name: compiled(SOURCES[name], name)}), CPU)


@needs_compiler
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_kernel_with_wrong_results_is_not_used(
    name: str, on_host: None, compiled: Callable[[str, str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    idle = {name: lambda *given: None}
    compiler = lambda source, wanted: idle.get(wanted) or compiled(source, wanted)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_making, "compiler_for", lambda device: compiler)
        made = make_kernels(CPU, Ways())
    assert [wanted for wanted in SOURCES if wanted not in made] == [name]
    assert f"torch does the work of the kernel {name}, which is not used: its results differ" in caplog.text


def test_lack_of_memory_while_making_kernels_is_raised() -> None:
    def has_no_room(source: str, name: str) -> Any:
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_making, "compiler_for", lambda device: has_no_room)
        with pytest.raises(RuntimeError, match="out of memory"):
            make_kernels(CPU, Ways())


def test_without_a_compiler_torch_replaces_the_kernels(caplog: pytest.LogCaptureFixture) -> None:
    def refuses(source: str, name: str) -> Any:
        raise OSError("Could not find any NVRTC library")

    assert not any(name in make_kernels(CPU, Ways()) for name in SOURCES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_making, "compiler_for", lambda device: refuses)
        made = make_kernels(CPU, Ways())
    assert not any(name in made for name in SOURCES)
    assert caplog.text.count("Could not find any NVRTC library") == len(SOURCES)
    torch.manual_seed(0)
    for name in sorted(set(SOURCES) - {"move"}):  # which is asked for by name alone
        CHECKS[name](made, CPU)


@needs_compiler
@pytest.mark.parametrize("score", JUDGED)
@pytest.mark.parametrize("n_classes", [2, 3, 33, 100])
def test_verdicts_equal_torchs_and_ties_go_to_the_first_class(score: str, n_classes: int, made: Kernels) -> None:
    rng = np.random.default_rng(n_classes)
    scale = 10.0 ** rng.uniform(-3, 3, size=(60, 1))
    logits = torch.from_numpy((scale * rng.normal(size=(60, n_classes))).astype(np.float32))
    logits[:20] = logits[:20].round()  # many are equal
    logits[20:40].view(-1)[torch.from_numpy(rng.integers(0, 20 * n_classes, 20))] = torch.tensor(
        [torch.nan, torch.inf, -torch.inf, 1e30] * 5
    )
    logits[0], logits[1], logits[2] = 0.0, -torch.inf, torch.nan
    expected = torch.empty((60, N_NUMBERS), dtype=torch.float64)
    judge_by_torch(logits, score, expected)
    told = torch.empty_like(expected)
    made.judge(logits, score, told)
    torch.testing.assert_close(told[:, 1:], expected[:, 1:], rtol=1e-12, atol=1e-300)
    np.testing.assert_array_equal(told[:, 0].numpy(), logits.numpy().argmax(axis=1))
    np.testing.assert_allclose(told[:, 2].numpy(), SCORES[score](logits.numpy()), rtol=1e-9, atol=1e-300)


@needs_compiler
def test_values_are_moved_together_and_odd_sizes_by_torch(made: Kernels) -> None:
    shapes = [(3, 4, 4), (8, 5, 5), (16, 1, 1), (24, 3, 3), (8, 2, 2), (40, 1, 1), (7,)]
    examples = {f"value_{i}": torch.zeros((2, *shape), dtype=torch.float16) for i, shape in enumerate(shapes)}
    names = list(examples)
    slots = torch.tensor([4, 9, 1, 7])
    given = {
        name: torch.randn((4, *shape)).to(torch.float16).contiguous(memory_format=torch.channels_last)
        if len(shape) == 3
        else torch.randn((4, *shape)).to(torch.float16)
        for name, shape in zip(names, shapes, strict=True)
    }
    values = Values(examples, 9, made, rooms={"value_1": 24, "value_0": 8, "value_3": 32})
    values.scatter(given, slots)
    order = torch.tensor([2, 0, 3, 1])
    for name, found in zip(names, values.gather(names, slots[order]), strict=True):
        assert torch.equal(found, given[name][order])
        if name in ("value_1", "value_3"):
            assert found.stride(3) == {"value_1": 24, "value_3": 32}[name]
            more = given["value_4"].expand(4, 8, *found.shape[2:]) if found.shape[2] == 2 else found[:, :8]
            more = more.contiguous(memory_format=torch.channels_last)
            grown = made.append(found, [more])
            assert grown.data_ptr() == found.data_ptr()
            assert torch.equal(grown, torch.cat([given[name][order], more], 1))
        else:
            assert found.ndim == 2 or found.is_contiguous(memory_format=torch.channels_last)
    assert not any(value.any() for value in values.gather(names, torch.tensor([0, 2, 3, 5, 6, 8])))


@needs_compiler
def test_growing_a_map_in_place_does_not_change_earlier_ones(made: Kernels) -> None:
    a, b, c, d = (
        torch.randn(2, width, 3, 5).to(torch.float16).contiguous(memory_format=torch.channels_last)
        for width in (16, 8, 8, 24)
    )
    first = made.concat([a, b], room=56)
    second = made.append(first, [c])
    third = made.append(second, [d])
    assert first.data_ptr() == second.data_ptr() == third.data_ptr()
    assert torch.equal(first, torch.cat([a, b], 1))
    assert torch.equal(second, torch.cat([a, b, c], 1))
    assert torch.equal(third, torch.cat([a, b, c, d], 1))
    assert third.is_contiguous(memory_format=torch.channels_last)
    for full in (third, a):  # without room, it is concatenated
        more = made.append(full, [b])
        assert more.data_ptr() != full.data_ptr()
        assert torch.equal(more, torch.cat([full, b], 1))


@needs_compiler
def test_maps_grow_in_place_if_only_products_read_them_with_gaps(made: Kernels) -> None:
    """What the shipped network's stages read and write: all but the last of a row of maps lie with gaps."""
    stages = lower(cut(shipped(), SHAPE, MEAN, STD), CPU, torch.float16, kernels=made, ways=ON_HOST)
    n_appending = 0
    for stage in stages:
        for node in stage.graph.nodes:
            concat = stage.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(concat, Concat):
                continue
            n_appending += concat.appends
            has_gaps = concat.room > node.meta[N_CHANNELS]
            for user in node.users:
                reader = stage.get_submodule(str(user.target)) if user.op == "call_module" else None
                is_product = isinstance(reader, ConvRelu) and reader.is_product
                assert is_product or isinstance(reader, Concat) or not has_gaps
    assert n_appending == 13 + len(rooms(stages)) == 24


class Carried(nn.Module):
    """A map that grows in the second stage, and is `read_again` in the third by what cannot read gaps."""

    def __init__(self, read_again: bool) -> None:
        super().__init__()
        self.first, self.product, self.again = (nn.Conv2d(n, 8, k, padding=k // 2) for n, k in ((3, 3), (8, 1), (8, 3)))
        self.heads = nn.ModuleList(nn.Linear(n, 4) for n in (8, 16, 24))
        self.relus, self.read_again = nn.ModuleList(nn.ReLU() for _ in range(3)), read_again

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        carried = self.relus[0](self.first(images))
        grown = torch.cat([carried, self.relus[1](self.product(carried))], 1)
        again = self.relus[2](self.again(carried if self.read_again else grown[:, :8]))
        maps = (carried, grown, torch.cat([again, grown], 1))
        return [head(x.mean((2, 3))) for head, x in zip(self.heads, maps, strict=True)]


@needs_compiler
@pytest.mark.parametrize("read_again", [False, True])
def test_a_map_that_a_third_stage_reads_is_gathered_without_room(made: Kernels, read_again: bool) -> None:
    network = Carried(read_again).eval()
    stages = lower(cut(network, SHAPE, MEAN, STD), CPU, torch.float16, kernels=made, ways=ON_HOST)
    assert list(rooms(stages).values()) == ([] if read_again else [16])


@needs_compiler
@pytest.mark.parametrize("channels", [(8, 8), (24, 16), (16, 8), (48, 32), (128, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_small_convolution_equals_torch(
    channels: tuple[int, int], stride: int, compiled: Callable[[str, str], Any]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, 3, stride, 1).half()
    assert is_small(conv)
    launch = make_small_conv(compiled, conv)
    assert launch is not None
    small, x = SmallConv(launch, conv), torch.randn(2, channels[0], 7, 6).half()
    assert not small.takes(x)
    x = x.contiguous(memory_format=torch.channels_last)
    assert small.takes(x)
    found = small(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, torch.relu(conv(x)), rtol=2e-3, atol=2e-3)
    x[0, 3, 2, 2] = torch.nan  # which stays in the pixels around it, and in no other row
    assert bool(small(x)[0].isnan().any())
    assert not bool(small(x)[1].isnan().any())


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(8, 8, 3, padding=1),  # float32
        nn.Conv2d(6, 8, 3, padding=1).half(),
        nn.Conv2d(8, 40, 3, padding=1).half(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False).half(),
        nn.Conv2d(8, 8, 3).half(),
        nn.Conv2d(8, 8, 1).half(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2).half(),
    ],
)
def test_other_convolutions_do_not_use_the_small_kernel(other: nn.Conv2d) -> None:
    assert not is_small(other)


def test_a_small_convolution_that_is_wrong_or_fails_to_compile_is_left_to_cudnn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1).half()
    assert make_small_conv(lambda source, name: lambda *given: given[2][0].fill_(7.0), conv) is None
    assert make_small_conv(lambda source, name: 1 // 0, conv) is None  # type: ignore[return-value]
    assert "no custom kernel convolves 8 channels to 8 with stride 1: its results differ" in caplog.messages
    assert len(caplog.messages) == 2


# --- all together -------------------------------------------------------------------------------------------------


@needs_compiler
@NETWORKS
def test_the_runner_with_every_kernel_gives_the_networks_answers(
    network: Callable[[], nn.Module], on_host: None
) -> None:
    """In float16, like on a GPU except for cuDNN and graphs."""
    made, pixels = network(), random_images(6, seed=5)
    ways = replace(ON_HOST, small=network is odd)  # which is slow here
    runner = TorchCudaRunner(
        made, SHAPE, MEAN, STD, "logit_margin", 4, 16, device=Host(), dtype=torch.float16, ways=ways
    )
    runner.warm_up(0.0)
    assert all(name in runner.kernels for name in SOURCES)
    with torch.inference_mode():
        whole = made(Normalise(MEAN, STD)(torch.from_numpy(pixels)))
    for start in (0, 3):
        for found, expected in zip(logits_of(runner, pixels[start : start + 3]), whole, strict=True):
            close(found, expected[start : start + 3].numpy(), tolerance=0.02)
    convs = [module for stage in runner.stages for module in stage.modules() if isinstance(module, ConvRelu)]
    assert any(conv.small is not None for conv in convs) == ways.small
    grown = [module for stage in runner.stages for module in stage.modules() if isinstance(module, Concat)]
    assert any(concat.appends for concat in grown) or network is not shipped
    targets = {str(node.target) for stage in runner.stages for node in stage.graph.nodes}
    assert any(target.startswith("kernel_cat") for target in targets)
    assert not any("torch.cat" in target for target in targets)


@pytest.mark.parametrize("ways", [Ways.none(), None], ids=["none", "on a processor"])
def test_without_the_faster_kernels_stages_are_unchanged(ways: Ways | None) -> None:
    runner = TorchCudaRunner(
        shipped(), SHAPE, MEAN, STD, None, 2, 8, device=Host(), dtype=torch.float16, n_lanes=1, ways=ways
    )
    assert not any(name in runner.kernels for name in SOURCES)
    widths = {m.out_channels for stage in runner.stages for m in stage.modules() if isinstance(m, nn.Conv2d)}
    assert 6 in widths


def test_if_cudnn_cannot_fuse_two_kernels_run_and_it_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    conv = ConvRelu(nn.Conv2d(3, 4, 3), None, fuse=True)
    enabled = torch.backends.cudnn.enabled
    with torch.inference_mode():
        expected = conv(torch.ones(2, 3, 8, 8))
        assert not conv.fused  # it is only tried during the search for algorithms
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        for rows in (2, 2, 1):
            assert torch.allclose(conv(torch.ones(rows, 3, 8, 8)), expected[:rows], atol=1e-6)
    assert torch.backends.cudnn.enabled == enabled
    assert conv.fused == {(2, 3, 8, 8): False}
    assert caplog.text.count("runs as two kernels, not as cuDNN's fused one") == 1


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("garbage", [False, True])
def test_cudnns_fusion_is_used_if_it_is_correct(monkeypatch: pytest.MonkeyPatch, garbage: bool, wrong: bool) -> None:
    """With the test's own in its place, which may multiply by 0 what its output held before, unless it has zeros to
    add; or is wrong."""
    calls = 0
    held = torch.zeros(2, 4, 6, 6)

    def join(x: Tensor, weight: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
        nonlocal calls
        calls += 1
        found = torch.relu(F.conv2d(x, weight, bias, *geometry)) + (held * 0 if garbage else 0)
        held.copy_(found)
        held.fill_(torch.nan)  # as who takes the memory next may
        return found.contiguous(memory_format=torch.channels_last)

    def add(x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: Any) -> Tensor:
        nonlocal calls
        calls += 1
        found = torch.relu(F.conv2d(x, weight, bias, *geometry) + alpha * z) + wrong
        assert z.shape == found.shape
        assert z.is_contiguous(memory_format=torch.channels_last)
        assert not z.any()
        return found.contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", join)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add)
    conv, x = ConvRelu(nn.Conv2d(3, 4, 3), None, fuse=True), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        first = conv(x)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        before = calls
        assert torch.allclose(conv(x), first)
        taken = not (garbage and wrong)
        assert conv.fused == {(2, 3, 8, 8): taken}
        assert calls == before + taken
        conv(x[:1])  # a size that was not tried
        assert calls == before + taken
