"""Costs equal the published integers exactly, and follow the counting rules for any layer, however it is called."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.cost import NetworkCost, measure_cost
from models.msdnet import CONFIGS
from models.registry import build_network

# Cumulative multiply-adds and parameters per exit. C-any's and I-7's are those of BoostNet's Tables 1 and 2.
PUBLISHED: dict[str, tuple[list[int], list[int]]] = {
    "C-any": (
        [
            *(15140452, 25505992, 37788460, 52061840, 62181620),
            *(74070872, 87729596, 100038944, 110121860, 121679336),
        ],
        [433876, 876792, 1381628, 1827836, 2279536, 2793444, 3369560, 3864948, 4378040, 4955644],
    ),
    "C-batch-4": (
        [15140452, 25751240, 33659180, 43336592, 51822068, 60307544],
        [433876, 783712, 1157652, 1593800, 1988348, 2431552],
    ),
    "C-batch-8": (
        [29101412, 38336456, 49340972, 58966160, 67943156, 78394712],
        [529280, 949876, 1432680, 1857580, 2322288, 2851508],
    ),
    "C-batch-12": (
        [45234020, 57123272, 70781996, 83091344, 93174260, 104731736],
        [728288, 1242196, 1818312, 2313700, 2826792, 3404396],
    ),
    "I-4": (
        [339902824, 685456720, 1008156120, 1254472688, 1360529624],
        [4238504, 8772240, 13073272, 16748416, 23958440],
    ),
    "I-5": (
        [422731560, 933845008, 1453512760, 1915234016, 2156907688],
        [5569800, 11798672, 17423864, 29475808, 38754952],
    ),
    "I-6": (
        [514661608, 1171181872, 1844515080, 2501402480, 2742059056],
        [7076712, 15689808, 24014008, 42187744, 56529304],
    ),
    "I-7": (
        [615692968, 1436392016, 2283210200, 2967421456, 3253794488],
        [8759240, 20154896, 31730040, 41860288, 62314472],
    ),
}
# The same in millions without what an exit does not read: computed once, by hand, from the layers' shapes.
EXECUTED_M: dict[str, list[float]] = {
    "C-any": [13.392, 23.463, 35.451, 50.959, 60.931, 72.673, 86.184, 100.039, 110.122, 121.679],
    "C-batch-4": [13.392, 22.937, 32.593, 42.123, 51.822, 60.308],
    "C-batch-8": [28.072, 37.160, 48.017, 58.966, 67.943, 78.395],
    "C-batch-12": [43.984, 55.726, 69.237, 83.091, 93.174, 104.732],
    "I-4": [255.82, 614.97, 964.74, 1254.47, 1360.53],
    "I-5": [329.82, 856.94, 1318.80, 1854.16, 2156.91],
    "I-7": [505.12, 1340.22, 2226.95, 2967.42, 3253.79],
}
LIN_GROW_M = {
    "C-lin-5": ([6.860, 14.350, 27.537, 41.715, 58.481], 2.079),
    "C-lin-7": ([6.860, 14.350, 27.291, 48.449, 76.433, 108.851, 137.281], 3.967),
}


@cache
def cost_of(name: str, **overrides: object) -> NetworkCost:
    with torch.device("meta"):
        return measure_cost(build_network("msdnet", {"config": name, **overrides}), CONFIGS[name].image_size_px)


@pytest.mark.parametrize("name", PUBLISHED)
def test_msdnet_costs_are_the_published_ones(name):
    cost = cost_of(name)
    published, parameters = PUBLISHED[name]
    assert list(cost.published) == published
    assert list(cost.parameters) == parameters
    if name in EXECUTED_M:
        places = 3 if name.startswith("C") else 2
        assert [round(ops / 1e6, places) for ops in cost.executed] == EXECUTED_M[name]
    # At the last exit nothing is left out, and every parameter counts once.
    assert cost.executed[-1] == cost.published[-1]
    with torch.device("meta"):
        network = build_network("msdnet", {"config": name})
    assert cost.parameters[-1] == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", LIN_GROW_M)
def test_lin_grow_costs_are_the_published_ones(name):
    cost = cost_of(name)
    millions, parameters_m = LIN_GROW_M[name]
    assert [round(ops / 1e6, 3) for ops in cost.published] == millions
    assert round(cost.parameters[-1] / 1e6, 3) == parameters_m


@pytest.mark.parametrize(
    ("name", "published", "executed"), [("C-any", 14_967_296, 13_256_192), ("I-5", 419_718_656, 327_394_816)]
)
def test_pure_multiply_adds_of_the_first_exit(name, published, executed):
    cost = cost_of(name)
    assert (cost.published_macs[0], cost.executed_macs[0]) == (published, executed)


def test_ten_classes_cost_a_smaller_classifier_at_every_exit():
    hundred, ten = cost_of("C-batch-4"), cost_of("C-batch-4", n_classes=10)
    for number, (a, b) in enumerate(zip(hundred.published, ten.published, strict=True), start=1):
        assert a - b == number * 90 * 129


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_boosting_costs_nothing(temperature):
    assert cost_of("C-lin-5", temperatures=temperature) == cost_of("C-lin-5", temperatures=0.5)


class OneExit(nn.Module):
    """An operation, followed by the mean of each channel as logits, which costs nothing."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.operation(images).flatten(2).mean(2)]


def assert_costs(operation: nn.Module, size_px: int, ops: int, macs: int) -> None:
    cost = measure_cost(OneExit(operation), size_px)
    assert cost.published == cost.executed == (ops,)
    assert cost.published_macs == cost.executed_macs == (macs,)


@settings(max_examples=25)
@given(
    size_px=st.integers(5, 12),
    groups=st.sampled_from([1, 3]),
    widen=st.integers(1, 4),
    kernel=st.sampled_from([1, 3, (3, 1), (1, 5)]),
    stride=st.integers(1, 3),
    bias=st.booleans(),
)
def test_a_convolution_counts_its_multiply_adds(size_px, groups, widen, kernel, stride, bias):
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    layer = nn.Conv2d(3, 3 * widen, kernel, stride, groups=groups, bias=bias)
    out_pixels = ((size_px - height) // stride + 1) * ((size_px - width) // stride + 1)
    macs = out_pixels * 3 * widen * (3 // groups) * height * width
    assert_costs(layer, size_px, macs, macs)
    expected_parameters = layer.weight.numel() + (3 * widen if bias else 0)
    assert measure_cost(OneExit(layer), size_px).parameters == (expected_parameters,)


@given(n_out=st.integers(1, 9), bias=st.booleans())
def test_a_linear_layer_counts_weights_and_biases(n_out, bias):
    layer = nn.Sequential(nn.Flatten(), nn.Linear(48, n_out, bias), nn.Unflatten(1, (n_out, 1)))
    assert_costs(layer, 4, 48 * n_out + (n_out if bias else 0), 48 * n_out)


@given(kernel=st.integers(1, 4), stride=st.integers(1, 4), size_px=st.integers(4, 12))
def test_pooling_counts_its_window(kernel, stride, size_px):
    outputs = 3 * ((size_px - kernel) // stride + 1) ** 2
    for pooling in (nn.AvgPool2d(kernel, stride), nn.MaxPool2d(kernel, stride)):
        assert_costs(pooling, size_px, outputs * kernel**2, 0)


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("operation", "ops"),
    [
        (nn.ReLU(), 192),
        (nn.ReLU(inplace=True), 192),
        (Call(F.relu), 192),
        (Call(torch.relu), 192),
        (Call(lambda x: x.relu()), 192),
        (Call(lambda x: F.relu(x, inplace=True)), 192),
        (nn.AdaptiveAvgPool2d(1), 192),
        (nn.AdaptiveAvgPool2d(4), 192),
        (nn.AdaptiveMaxPool2d(2), 192),
        (Call(lambda x: F.adaptive_avg_pool2d(x, 2)), 192),
        (Call(lambda x: F.avg_pool2d(x, 2)), 192),
        (Call(lambda x: F.max_pool2d(x, (2, 4))), 192),
        (nn.BatchNorm2d(3), 0),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 0),
        (nn.Softmax(1), 0),
        (nn.Sigmoid(), 0),
        (Call(lambda x: torch.cat([x, x], 1) * 2 + 1), 0),
    ],
)
def test_which_operations_count(operation, ops):
    assert_costs(operation, 8, ops, 0)


class Tokens(nn.Module):
    """An operation on images reshaped to 3 tokens of 64 numbers."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, images: Tensor) -> Tensor:
        return self.operation(images.flatten(2))


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("operation", "macs"),
    [
        (lambda x: x @ x.mT, 3 * 3 * 64),
        (lambda x: torch.matmul(x.mT[..., None, :], x.mT[..., None]), 64 * 3),
        (lambda x: torch.bmm(x, x.mT), 3 * 3 * 64),
        (lambda x: torch.baddbmm(x, x @ x.mT, x), 2 * 3 * 3 * 64),
        (lambda x: torch.einsum("nci,ndi->ncd", x, x), 3 * 3 * 64),
        (lambda x: F.scaled_dot_product_attention(x, x, x), 2 * 3 * 3 * 64),
        (SelfAttention(need_weights=False), 4 * 3 * 64 * 64 + 2 * 3 * 3 * 64),
        (SelfAttention(need_weights=True), 4 * 3 * 64 * 64 + 2 * 3 * 3 * 64),
        (nn.Conv1d(3, 5, 4), 61 * 5 * 3 * 4),
        (nn.ConvTranspose1d(3, 5, 4, 2), 64 * 5 * 3 * 4),
    ],
)
def test_products_of_matrices_count_their_multiply_adds(operation, macs, device):
    network = OneExit(Tokens(operation))
    network.register_parameter("somewhere", nn.Parameter(torch.empty(1)))  # the parameters determine a network's device
    cost = measure_cost(network.to(device), 8)
    assert cost.published == cost.published_macs == (macs,)


def test_a_transformer_layer_counts_its_parts():
    layer = nn.TransformerEncoderLayer(64, 4, 16, batch_first=True)
    attention, feed_forward = 4 * 3 * 64 * 64 + 2 * 3 * 3 * 64, 2 * 3 * 64 * 16
    biases_and_relu = 3 * (16 + 64) + 3 * 16
    assert_costs(Tokens(layer), 8, attention + feed_forward + biases_and_relu, attention + feed_forward)
    with torch.inference_mode():
        assert_costs(Tokens(layer), 8, attention + feed_forward + biases_and_relu, attention + feed_forward)


def test_functions_cost_as_much_as_their_layers():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))

        def forward(self, images: Tensor) -> list[Tensor]:
            maps = F.relu(F.conv2d(images, weight=self.kernel, bias=self.bias, padding=1))
            first = F.linear(maps.mean((2, 3)), torch.eye(4)[:3])
            return [first, F.linear(maps.amax((2, 3)), self.kernel[..., 0, 0].t(), bias=self.bias[:3])]

    cost = measure_cost(Functional(), 8)
    assert cost.published == (6912 + 256 + 12, 6912 + 256 + 12 + 15)
    assert cost.parameters == (112, 112)


def test_published_cost_counts_all_operations_and_executed_cost_the_needed_ones():
    class Lazy(nn.Module):
        """Computes before its first exit a map that only the second reads, and one that is never read."""

        def __init__(self) -> None:
            super().__init__()
            self.early, self.late, self.unread = (nn.Conv2d(3, 2, 1, bias=False) for _ in range(3))

        def forward(self, images: Tensor) -> list[Tensor]:
            late, _ = self.late(images), self.unread(images)
            first = self.early(images).mean((2, 3))
            return [first, first + late.mean((2, 3))]

    cost = measure_cost(Lazy(), 4)
    one = 16 * 2 * 3
    assert cost.published == (3 * one, 3 * one)
    assert cost.executed == (one, 2 * one)
    assert cost.parameters == (18, 18)
