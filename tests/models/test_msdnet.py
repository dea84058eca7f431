"""The architecture: layer plans, shapes and parameters of every published configuration."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.bundle import WEIGHTS, ZOO, load_bundle
from models.msdnet import CONFIGS, MSDNet, MSDNetConfig, layer_plans
from models.normalise import Normalise
from models.registry import build_network
from training.stage_sessions import StageSessions

# Depth, (layer: units before and after its transition), input channels of heads 1..N; from the reference code.
PLANS = {
    "C-any": (22, {9: (70, 35), 17: (83, 41)}, [160, 208, 256, 164, 212, 260, 308, 188, 236, 284]),
    "C-batch-4": (14, {6: (52, 26), 11: (56, 28)}, [160, 104, 152, 200, 136, 184]),
    "C-batch-8": (18, {7: (58, 29), 13: (65, 32)}, [140, 188, 236, 152, 200, 248]),
    "C-batch-12": (22, {9: (70, 35), 17: (83, 41)}, [212, 260, 308, 188, 236, 284]),
    "C-lin-5": (15, {6: (52, 26), 11: (56, 28)}, [88, 136, 104, 200, 208]),
    "C-lin-7": (28, {11: (82, 41), 21: (101, 50)}, [88, 136, 208, 304, 260, 200, 368]),
    "I-4": (20, {6: (128, 64), 11: (144, 72), 16: (152, 76)}, [384, 384, 352, 304, 560]),
    "I-5": (25, {8: (160, 80), 15: (192, 96), 22: (208, 104)}, [448, 448, 384, 704, 608]),
    "I-6": (30, {9: (176, 88), 17: (216, 108), 25: (236, 118)}, [512, 544, 496, 880, 792]),
    "I-7": (35, {10: (192, 96), 19: (240, 120), 28: (264, 132)}, [576, 640, 608, 528, 976]),
}


def on_meta(config: MSDNetConfig) -> MSDNet:
    with torch.device("meta"):
        return MSDNet(config).eval()


@pytest.mark.parametrize("name", PLANS)
def test_layers_scales_and_head_widths_are_the_published_ones(name: str) -> None:
    depth, transitions, head_widths = PLANS[name]
    plans = list(layer_plans(CONFIGS[name]))
    assert len(plans) == depth
    found = {
        layer: (plan.units_out, plan.units_reduced)
        for layer, plan in enumerate(plans, start=1)
        if plan.units_reduced is not None
    }
    assert found == transitions
    heads = on_meta(CONFIGS[name]).heads
    widths = [next(m for m in head.modules() if isinstance(m, nn.Conv2d)).in_channels for head in heads]
    assert widths == head_widths


@pytest.mark.parametrize("name", CONFIGS)
def test_every_exit_gives_logits_from_the_coarsest_map(name: str) -> None:
    config = CONFIGS[name]
    network = on_meta(config)
    maps: list[tuple[int, ...]] = []
    for head in network.heads:
        head.register_forward_hook(lambda _module, inputs, _output: maps.append(tuple(inputs[0].shape[2:])))
    logits = network(torch.empty(2, 3, config.image_size_px, config.image_size_px, device="meta"))
    assert [tuple(x.shape) for x in logits] == [(2, config.n_classes)] * config.n_blocks
    side = 8 if config.stem == "cifar" else 7
    assert maps == [(side, side)] * config.n_blocks


def test_ten_classes_take_their_parameters_from_each_head() -> None:
    """10 classes instead of 100 save 90 x 129 parameters per head."""
    sizes = [sum(p.numel() for p in on_meta(replace(CONFIGS["C-any"], n_classes=n)).parameters()) for n in (100, 10)]
    assert sizes[0] - sizes[1] == 10 * 90 * 129


def test_prune_min_keeps_the_scales_until_the_last_layers() -> None:
    plans = list(layer_plans(replace(CONFIGS["C-any"], prune="min")))
    assert [plan.n_scales_out for plan in plans] == [3] * 20 + [2, 1]
    assert [layer for layer, plan in enumerate(plans, 1) if plan.units_reduced is not None] == [7, 14]
    network = on_meta(replace(CONFIGS["C-any"], prune="min"))
    assert len(network(torch.empty(1, 3, 32, 32, device="meta"))) == 10


def test_without_bottlenecks_branches_are_one_convolution() -> None:
    network = on_meta(replace(CONFIGS["C-any"], bottleneck=False))
    n_3x3 = sum(m.kernel_size == (3, 3) for m in network.blocks.modules() if isinstance(m, nn.Conv2d))
    n_1x1 = sum(m.kernel_size == (1, 1) for m in network.blocks.modules() if isinstance(m, nn.Conv2d))
    assert n_3x3 > n_1x1 == 2 + 1  # only in transitions: two scales remain after the first, one after the second


@pytest.mark.parametrize("initialisation", ["torch", "he"])
def test_initial_weights_are_torchs_defaults_or_he(initialisation: Literal["torch", "he"]) -> None:
    torch.manual_seed(0)
    network = MSDNet(CONFIGS["C-batch-4"], initialisation=initialisation)
    for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000):
        # torch: uniform within 1 / sqrt(fan in); he: normal, by fan out.
        variance = 1 / (3 * conv.weight[0].numel()) if initialisation == "torch" else 2 / conv.weight[:, 0].numel()
        assert float(conv.weight.detach().std()) == pytest.approx(variance**0.5, rel=0.1)
    biases = [bool(m.bias.any()) for m in network.modules() if isinstance(m, nn.Linear)]
    assert biases == [initialisation == "torch"] * 6


def test_rows_do_not_depend_on_the_batch_they_share() -> None:
    torch.manual_seed(0)
    network = MSDNet(CONFIGS["C-batch-4"]).eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        together: list[Tensor] = network(images)
        alone: list[Tensor] = network(images[3:4])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[3:4], b, rtol=0, atol=1e-5)


def test_a_network_is_built_from_plain_json() -> None:
    network = build_network("msdnet", {"config": "C-batch-4", "n_classes": 10, "temperatures": [0.25]})
    assert isinstance(network, MSDNet)
    assert (network.config.n_classes, network.n_exits, network.boosting.temperatures) == (10, 6, (0.25,) * 6)


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        ("vgg", {}, "no architecture 'vgg'"),
        ("msdnet", {"config": "C-huge"}, "C-huge"),
        ("msdnet", {"config": "C-any", "depth": 3}, "depth"),
    ],
)
def test_an_unknown_name_or_argument_is_refused(architecture: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(architecture, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initialisation": "Torch"}, "initialisation must be one of 'torch', 'he', and not 'Torch'"),
        ({"gradient_rescaling": "none"}, "gradient_rescaling must be one of 'off'"),
        ({"step_mode": "evne"}, "step_mode must be one of 'even', 'lin_grow', and not 'evne'"),
        ({"stem": "Cifar"}, "stem must be one of 'cifar', 'imagenet'"),
        ({"n_channels": 0}, "n_channels must be a whole number of at least 1, and not 0"),
        ({"growth_rate": "6"}, "growth_rate must be a whole number"),
        ({"growth_factors": [1, 2.5, 4]}, "growth_factors must be a list of whole numbers"),
        ({"growth_factors": 3}, "growth_factors must be a list of whole numbers of at least 1, and not 3"),
        ({"reduction": 1.5}, "reduction must be above 0 and at most 1, and not 1.5"),
        ({"reduction": float("nan")}, "reduction must be above 0"),
        ({"prune": "foo"}, "prune must be one of 'max', 'min', and not 'foo'"),
        ({"bottleneck": "no"}, "bottleneck must be true or false, and not 'no'"),
        ({"growth_rate": 3, "growth_factors": [1, 1, 2]}, "must be even"),
        ({"reduction": 0.001}, "reduction must leave at least one channel"),
        ({"growth_factors": [1, 2]}, "one entry per scale"),
    ],
)
def test_an_argument_that_would_silently_change_the_network_is_refused(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_network("msdnet", {"config": "C-any", **arguments})


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ZOO.glob("*/manifest.json")))
def test_the_bundles_that_ship_rebuild_their_networks(name: str) -> None:
    """Weights trained before a change of the code load after it, and give the answers of the graphs exported then."""
    manifest = load_bundle(ZOO / name, verify=False).manifest
    network = build_network(manifest.architecture, manifest.arguments)
    network.load_state_dict(load_file(ZOO / name / WEIGHTS), strict=True)
    side_px, draw = manifest.input.height_px, np.random.default_rng(0)
    pixels = draw.integers(0, 256, (2, side_px, side_px, 3), dtype=np.uint8)
    with torch.inference_mode():
        normalised = Normalise(manifest.input.mean, manifest.input.std)(torch.from_numpy(pixels))
        answers = [x.numpy() for x in network.eval()(normalised)]
    for ours, exported in zip(answers, StageSessions(ZOO / name, manifest.stages).run(pixels, name), strict=True):
        np.testing.assert_allclose(ours, exported, atol=1e-3)
