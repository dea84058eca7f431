"""RANet in stages and as ONNX graphs gives the whole network's answers, including resizing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from models.bundle import load_bundle
from models.cost import measure_cost
from models.registry import build_network
from models.staging import split
from service.runners.onnx import OnnxRunner
from tests.models.networks import randomise_statistics
from tests.training import tiny
from tests.training.test_command import command
from training.checkpoint import RunFolder
from training.export import Normalise

# Three sub-networks with one exit each: the later two start at twice the size of the first, downsample, and fuse maps
# of another size and of their own.
ARGUMENTS = {
    "config": "C-m1",
    "scales": [1, 2, 2],
    "growth_factors": [2, 2, 1],
    "bottleneck_factors": [2, 2, 1],
    "n_channels": 4,
    "growth_rate": 4,
    "n_blocks": 1,
    "block_step": 1,
}
RECIPE = """
description = "tiny"
held_out_images = 40
[network]
architecture = "ranet"
[network.arguments]
config = "C-m1"
scales = [1, 2]
growth_factors = [2, 1]
bottleneck_factors = [2, 1]
n_channels = 4
growth_rate = 4
n_blocks = 1
block_step = 1
step = 1
[objective]
gradient_rescaling = "all"
[optimisation]
epochs = 2
batch_rows = 16
schedule = "cosine"
[numerics]
precision = "bf16"
"""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise_statistics(build_network("ranet", {**ARGUMENTS, "n_classes": 10})).eval()


def images_of_16_px(n_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 16 px, for which two sub-networks suffice."""
    images, labels = tiny.coloured(n_images, seed)
    return images[:, ::2, ::2].copy(), labels


@torch.no_grad()
def test_stages_answer_bit_for_bit_and_keep_each_map_once(network: nn.Module) -> None:
    images = torch.randn(2, 3, 16, 16)
    staged = split(network, images)
    for whole, part in zip(network(images), staged.run(images), strict=True):
        assert torch.equal(whole, part)
    # After exit 1, the state is the next sub-networks' first maps and one map of the block to be fused. It has three
    # features: the narrower ones are the first channels of the widest.
    assert sorted(spec.shape for spec in staged.state_after(1)) == [(4, 16, 16), (8, 16, 16), (10,), (24, 8, 8)]
    # A downsampling block has one per size.
    kept = sorted(spec.shape for spec in staged.state_after(2))
    assert kept == [(4, 16, 16), (10,), (16, 16, 16), (24, 8, 8), (47, 8, 8)]


def test_a_trained_runs_bundle_gives_the_networks_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, calibration and export work with RANet as with MSDNet, also in bfloat16."""
    data, recipe, run, output = (tmp_path / name for name in ("images", "tiny.toml", "run", "bundle"))
    for part, n_images, seed in (("train", tiny.N_TRAIN, 1), ("val", tiny.N_TEST, 2)):
        for number, (image, label) in enumerate(zip(*images_of_16_px(n_images, seed), strict=True)):
            folder = data / part / tiny.CLASS_NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    recipe.write_text(RECIPE)
    for step in (
        ("train", run, "--recipe", recipe, "--data", data, "--device", "cpu", "--image-size", 16),
        ("calibrate", run, "--data", data, "--device", "cpu"),
        ("evaluate", run),
        ("export", run, "--output", output),
    ):
        assert command(monkeypatch, *step) == 0
    assert all(np.isfinite(record["losses"]).all() for record in RunFolder(run).read_log())

    bundle = load_bundle(output)
    manifest = bundle.manifest
    assert manifest.architecture == "ranet"
    network = build_network(manifest.architecture, manifest.arguments).eval()
    network.load_state_dict(load_file(output / "weights.safetensors"), strict=True)
    assert [e.executed_mflops for e in manifest.exits] == [ops / 1e6 for ops in measure_cost(network, 16).executed]
    images, _ = images_of_16_px(9, 3)
    with torch.no_grad():
        whole = network(Normalise(manifest.input.mean, manifest.input.std)(torch.from_numpy(images)))
    runner = OnnxRunner(bundle, n_lanes=1)
    rows = [runner.first_state(image) for image in images]
    alone = [runner.first_state(images[3])]
    for stage, expected in enumerate(whole):
        together, single = runner.run(stage, rows), runner.run(stage, alone)
        np.testing.assert_allclose(together.logits, expected.numpy(), rtol=0, atol=1e-5)
        assert np.array_equal(together.logits[3], single.logits[0])
        rows, alone = list(together.states), list(single.states)
