"""The architecture: shapes, costs and parameters of every published configuration, initial weights, gradients."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.boosting import Rescaling
from models.cost import measure_cost
from models.ranet import CONFIGS, Block, RANet, block_plans
from models.registry import build_network

# Cumulative multiply-adds and parameters per exit, from the reference code. C-any's are those of BoostNet's Table 1.
PUBLISHED: dict[str, tuple[list[int], list[int]]] = {
    "C-any": (
        [15826020, 31306440, 44690220, 50404752, 60712628, 63717656, 90255228, 94997472],
        [482052, 1097000, 1511586, 1914854, 2223662, 2523154, 2952906, 3354710],
    ),
    "C-m1": (
        [8372324, 21788360, 32878892, 41570192, 53283828, 58990680],
        [358660, 899880, 1304995, 1800711, 2188193, 2617261],
    ),
    "C-m2": (
        [10739812, 24155848, 35246380, 43937680, 93068276, 114677336, 164023356, 175743648],
        [367940, 909160, 1314275, 1809991, 2717647, 3685779, 4462599, 5186987],
    ),
    "C-m3": (
        [10748004, 24164040, 35254572, 43945872, 55659508, 61366360, 105640124, 117360416],
        [360996, 902216, 1307331, 1803047, 2190529, 2619597, 3336189, 4060577],
    ),
    "I-64": (
        [434968808, 888669904, 1153356020, 1352449308, 2279913603, 2588473759, 3235517799, 3333484943],
        [14083432, 48077136, 60103248, 78659176, 100951482, 130170440, 139095138, 149144186],
    ),
    "I-32": (
        [246472360, 631164048, 860403190, 1041144878, 1869847124, 2160379452, 2734279235, 2828311039],
        [9916712, 37916432, 48345820, 65121348, 85601768, 113060656, 121474513, 131123991],
    ),
}
# The output of each block of the anytime network, channels @ pixels; f fuses, D downsamples, T reduces.
BLOCKS_OF_C_ANY = [
    ["160@8", "256@8"],
    ["f 100@16", "f D T 92@8", "140@8", "188@8"],
    ["f 50@32", "f D T 46@16", "f 87@16", "f D T 69@8", "93@8", "117@8"],
    ["f 50@32", "f T 46@32", "f 87@32", "f D 138@16", "f T 101@16", "f D 156@8", "180@8", "204@8"],
]


def on_meta(name: str) -> RANet:
    with torch.device("meta"):
        return RANet(CONFIGS[name]).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_and_parameters_are_the_published_ones(name: str) -> None:
    network = on_meta(name)
    cost = measure_cost(network, CONFIGS[name].image_size_px)
    published, parameters = PUBLISHED[name]
    assert list(cost.published) == published
    assert list(cost.parameters) == parameters
    assert cost.parameters[-1] == sum(p.numel() for p in network.parameters())
    # Nothing can be deferred: every map of an exit's blocks leads to that exit, including the first maps of the later
    # sub-networks, since the smaller ones are computed from them.
    assert cost.executed == cost.published
    assert CONFIGS[name].n_exits == len(published)


def test_blocks_of_the_anytime_network_have_the_published_shapes() -> None:
    network = on_meta("C-any")
    shapes: dict[nn.Module, str] = {}
    for module in network.modules():
        if isinstance(module, Block):
            module.register_forward_hook(
                lambda block, _, made: shapes.update({block: f"{made[0].shape[1]}@{made[0].shape[2]}"})
            )
    maps = network.stem(torch.empty(2, 3, 32, 32, device="meta"))
    assert [(x.shape[1], x.shape[2]) for x in maps] == [(64, 8), (32, 16), (16, 32), (16, 32)]
    logits = network(torch.empty(2, 3, 32, 32, device="meta"))
    assert [tuple(x.shape) for x in logits] == [(2, 100)] * 8

    def told(block: Block) -> str:
        plan = block.plan
        signs = [("f", plan.low is not None), ("D", plan.scale_out < plan.scale_in), ("T", plan.reduced is not None)]
        return " ".join([*(sign for sign, holds in signs if holds), shapes[block]])

    found = [[told(block) for block in blocks] for blocks in network.subnetworks]  # type: ignore[arg-type]
    assert found == BLOCKS_OF_C_ANY


def test_imagenet_networks_start_and_end_with_the_published_maps() -> None:
    network = on_meta("I-64")
    maps = network.stem(torch.empty(1, 3, 224, 224, device="meta"))
    assert [(x.shape[1], x.shape[2]) for x in maps] == [(256, 7), (128, 14), (128, 28), (64, 56)]
    widths = [head.features[0].in_channels for head in network.heads]
    assert widths == [768, 1280, 716, 972, 975, 1231, 588, 716]


def test_blocks_and_heads_are_initialised_and_the_stem_is_not() -> None:
    """Like the released code: N(0, 2 / (k k n)) for blocks and heads, torch's uniform defaults for the stem."""
    torch.manual_seed(0)
    network = RANet(CONFIGS["C-m1"])
    for part in (*network.subnetworks, *network.heads):
        for conv in (m for m in part.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000):
            expected = math.sqrt(2.0 / (conv.kernel_size[0] ** 2 * conv.out_channels))
            assert float(conv.weight.detach().std()) == pytest.approx(expected, rel=0.1)
        assert not any(m.bias.any() for m in part.modules() if isinstance(m, nn.Linear))
    for conv in (m for m in network.stem.modules() if isinstance(m, nn.Conv2d)):
        assert float(conv.weight.detach().abs().max()) <= 1.0 / math.sqrt(conv.weight[0].numel())  # uniform, not normal
    torch.manual_seed(0)
    left = RANet(CONFIGS["C-m1"], initialisation="torch")
    assert all(m.bias.any() for m in left.heads.modules() if isinstance(m, nn.Linear))


# For images of 16 px, since the smallest map must have 8.
TINY = replace(
    CONFIGS["C-m1"],
    n_classes=7,
    scales=(1, 2, 2),
    growth_factors=(2, 2, 1),
    bottleneck_factors=(2, 2, 1),
    n_channels=4,
    growth_rate=4,
    step=1,
)
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(6, 3, 16, 16, generator=generator), torch.randint(0, 7, (6,), generator=generator)


def tiny(rescaling: Rescaling = "off", temperatures: float | Sequence[float] = 0.5) -> RANet:
    torch.manual_seed(0)
    return RANet(TINY, temperatures, rescaling).train()


def gradients(network: RANet, logits: Tensor, labels: Tensor) -> Gradients:
    parameters = dict(network.named_parameters())
    loss = functional.cross_entropy(logits, labels)
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def exits_of_parameters(network: RANet) -> dict[str, int]:
    """The first exit (0-based) that needs each parameter of the stem and the blocks."""
    exits = {f"stem.{name}": 0 for name, _ in network.stem.named_parameters()}
    for index, plans in enumerate(block_plans(network.config)):
        for number, plan in enumerate(plans):
            block = network.subnetworks[index].get_submodule(str(number))
            exits |= {f"subnetworks.{index}.{number}.{name}": plan.exit for name, _ in block.named_parameters()}
    return exits


def test_a_fusing_block_follows_its_definition() -> None:
    """x <- [x, u, y] layer by layer, resized to y corner on corner; neither costs nor shapes show order and corners."""
    plan = block_plans(TINY)[1][1]  # two layers, of which the second halves the map
    assert plan.low is not None
    assert (plan.scale_in, plan.scale_out, plan.low.scale_out) == (2, 1, 1)
    torch.manual_seed(0)
    block = Block(TINY, 1, plan).eval()
    start, low = torch.randn(2, plan.widths[0], 16, 16), [torch.randn(2, n, 8, 8) for n in plan.low.widths]

    def resized(x: Tensor, like: Tensor) -> Tensor:
        return functional.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)

    assert block.compress is not None
    assert block.transition is not None
    x = start
    for own, of_low, u in zip(block.own, block.low, low[:-1], strict=True):
        y = own(x)
        x = torch.cat([resized(x, y), resized(of_low(u), y), y], 1)
    x = block.transition(torch.cat([x, resized(block.compress(low[-1]), x)], 1))
    torch.testing.assert_close(block(start, low)[0], x)


def test_planned_exits_match_the_gradients(batch: tuple[Tensor, Tensor]) -> None:
    """An exit's loss reaches all blocks planned up to it and none after it, and of the heads only its own."""
    images, labels = batch
    network = tiny()
    exits = exits_of_parameters(network)
    assert set(exits) == {name for name, _ in network.named_parameters() if not name.startswith("heads")}
    for number, logits in enumerate(network(images)):
        found = gradients(network, logits, labels)
        assert {name.split(".")[1] for name in found if name.startswith("heads")} == {str(number)}
        blocks_found = {name for name in found if not name.startswith("heads")}
        # The maps of a block beyond its features are read only by the next block of its sub-network.
        beyond = {name for name, first in exits.items() if first <= number} - blocks_found
        assert blocks_found <= {name for name, first in exits.items() if first <= number}
        assert all("compress" in name or "transition" in name for name in beyond)


def test_with_every_map_rescaled_equation_7_holds_exactly(batch: tuple[Tensor, Tensor]) -> None:
    """Loss j reaches block i with weight 1 / (N - i) on every path; the gradients of heads are unchanged."""
    images, labels = batch
    plain, scaled = tiny("off"), tiny("all")
    expected, outputs = plain(images), scaled(images)
    exits = exits_of_parameters(plain)
    for wanted, logits in zip(expected, outputs, strict=True):
        assert torch.equal(wanted, logits)
        found, before = gradients(scaled, logits, labels), gradients(plain, wanted, labels)
        assert found.keys() == before.keys()
        for name, gradient in found.items():
            weight = 1.0 if name.startswith("heads") else 1.0 / (plain.n_exits - exits[name])
            largest = float(before[name].abs().max())
            torch.testing.assert_close(gradient, before[name] * weight, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_with_the_coarsest_map_rescaled_equation_7_holds_within_a_sub_network(batch: tuple[Tensor, Tensor]) -> None:
    """Gradients to earlier sub-networks take other paths, which are not rescaled, like MSDNet's finer maps."""
    images, labels = batch
    plain, scaled = tiny("off"), tiny("coarsest")
    before, found = (gradients(net, net(images)[-1], labels) for net in (plain, scaled))
    exits = exits_of_parameters(plain)
    names = [name for name in found if name.startswith(f"subnetworks.{len(plain.subnetworks) - 1}")]
    assert {exits[name] for name in names} == {4, 5}
    for name in names:
        weight, largest = 1.0 / (plain.n_exits - exits[name]), float(before[name].abs().max())
        torch.testing.assert_close(found[name], before[name] * weight, rtol=1e-3, atol=1e-4 * largest, msg=name)
    first = "subnetworks.0.0.own.0.0.weight"
    assert found[first].norm() > 1.2 * before[first].norm() / plain.n_exits


def test_training_and_evaluation_mode_give_the_same_ensemble(batch: tuple[Tensor, Tensor]) -> None:
    """With fixed normalisation, the features that a waiting image carries equal those of training bit for bit."""
    network = tiny("all", [0.5, 1.0])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    trained = network(batch[0])
    for a, b in zip(trained, network.eval()(batch[0]), strict=True):
        assert torch.equal(a, b)


def test_a_network_is_built_from_plain_json() -> None:
    network = build_network("ranet", {"config": "C-m1", "n_classes": 10, "temperatures": [0.25], "scales": [1, 2, 2]})
    assert isinstance(network, RANet)
    assert (network.config.n_classes, network.n_exits, network.boosting.temperatures) == (10, 6, (0.25,) * 6)
    assert network.gradient_rescaling == "off"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "C-huge"}, "architecture 'ranet': no configuration 'C-huge'; known: C-any, C-m1"),
        ({"n_channels": 8}, "architecture 'ranet': config is missing, the name of a configuration; known: C-any, C-m1"),
        ({"config": "C-any", "base": 3}, "architecture 'ranet': no argument 'base'; known: config, n_classes"),
        ({"config": "C-any", "scales": [1, 3, 3, 3]}, "scales must start at 1 and rise by 0 or 1"),
        ({"config": "C-any", "scales": [1, 2]}, "one entry per sub-network"),
        ({"config": "C-any", "growth_rate": 3}, "compression must leave at least one channel"),
        ({"config": "C-any", "block_step": 3}, "no more than n_blocks"),
        (
            {"config": "C-any", "initialisation": "Torch"},
            "initialisation must be one of 'torch', 'he', and not 'Torch'",
        ),
        ({"config": "C-any", "gradient_rescaling": "none"}, "gradient_rescaling must be one of 'off'"),
        ({"config": "C-any", "step_mode": "evne"}, "step_mode must be one of 'even', 'lin_grow', and not 'evne'"),
        ({"config": "C-any", "stem": "Cifar"}, "stem must be one of 'cifar', 'imagenet'"),
        ({"config": "C-any", "n_channels": 0}, "n_channels must be a whole number of at least 1, and not 0"),
        ({"config": "C-any", "growth_rate": "6"}, "growth_rate must be a whole number"),
        ({"config": "C-any", "growth_factors": [1, 2.5, 4]}, "growth_factors must be a list of whole numbers"),
        ({"config": "C-any", "scales": 3}, "scales must be a list of whole numbers of at least 1, and not 3"),
        ({"config": "C-any", "reduction": 1.5}, "reduction must be above 0 and at most 1, and not 1.5"),
        ({"config": "C-any", "reduction": float("nan")}, "reduction must be above 0"),
        ({"config": "C-any", "compression": 0}, "compression must be above 0"),
    ],
)
def test_an_invalid_argument_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network("ranet", arguments)
