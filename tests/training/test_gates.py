"""Gates trained beside the heads to predict whether going on helps: targets, gradients, and that none is served."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.training import tiny
from training.calibration import load_trained
from training.checkpoint import RunFolder
from training.gates import Gates, HeadInputs, mended
from training.loop import Trainer
from training.objectives import build_objective, network_of, served, trainable
from training.processes import Processes
from training.recipe import RecipeError

ALONE = Processes(0, 1, torch.device("cpu"))
GATED = tiny.recipe(n_exits=3, objective={"gates": 0.3})


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def gated(recipe: tiny.Recipe = GATED) -> torch.nn.Module:
    torch.manual_seed(0)
    return trainable(network_of(recipe, 4), recipe.objective).train()


def test_going_on_helps_where_this_exit_is_wrong_and_a_later_one_right() -> None:
    answers = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0]])  # three exits, four images of class 0
    logits = [functional.one_hot(row, 2).float() for row in answers]
    assert mended(logits, torch.zeros(4, dtype=torch.int64)).tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]


def test_gates_have_the_input_of_their_heads_last_layer() -> None:
    network, (images, _) = gated(), batch()
    kept = HeadInputs(network)
    network.eval()(images)
    inputs, heads = kept.take(), []
    maps = network.stem(images)
    for block, head in zip(network.blocks, network.heads, strict=True):
        maps = block(maps)
        heads.append(head.features(maps[-1]).flatten(1))
    assert all(torch.equal(a, b) for a, b in zip(inputs, heads, strict=True))
    network(images)
    expected = [gate(x).squeeze(1) for gate, x in zip(network.gates.outputs, heads, strict=False)]
    assert torch.equal(network.gates(), torch.stack(expected))


def test_their_loss_is_added_with_its_weight_and_reaches_the_network() -> None:
    network, (images, labels) = gated(), batch()
    plain, _ = build_objective(tiny.recipe().objective)(network, images, labels)
    total, _ = build_objective(GATED.objective, network)(network, images, labels)
    logits = network(images)
    says = network.gates()
    expected = sum(
        functional.binary_cross_entropy_with_logits(a, b) for a, b in zip(says, mended(logits, labels), strict=True)
    )
    assert isinstance(expected, torch.Tensor)
    assert (total - plain).item() == pytest.approx(0.3 * expected.item(), rel=1e-4)
    network.zero_grad()
    expected.backward()
    assert any(torch.any(p.grad != 0) for p in network.stem.parameters() if p.grad is not None)
    assert all(head.classifier.weight.grad is None for head in network.heads)  # classifiers get no gradient


def test_a_network_with_one_exit_has_no_gates() -> None:
    with pytest.raises(RecipeError, match=r"objective\.gates: the network has one exit"):
        gated(tiny.recipe(n_exits=1, objective={"gates": 0.3}))


def test_the_served_network_has_no_gates_and_the_same_answers() -> None:
    network, (images, _) = gated().eval(), batch()
    before = network(images)
    after = served(network)
    assert not any(isinstance(module, Gates) for module in after.modules())
    assert not any(head.classifier._forward_pre_hooks for head in after.heads)
    assert all(torch.equal(a, b) for a, b in zip(before, after(images), strict=True))
    assert {name for name, _ in after.named_parameters()} == {
        name for name, _ in network_of(GATED, 4).named_parameters()
    }


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_a_run_with_gates_resumes_and_loads_without_them(tmp_path: Path, ema_decay: float) -> None:
    images = tiny.image_set(tmp_path / "cifar")
    recipe = tiny.recipe(objective={"gates": 0.3}, optimisation={"ema_decay": ema_decay})
    Trainer(recipe, images, RunFolder(tmp_path / "whole"), 0, ALONE).train()
    while Trainer(recipe, images, RunFolder(tmp_path / "pieces"), 0, ALONE).train(time_limit_s=0) == "time limit":
        pass
    one, other = (RunFolder(tmp_path / name).load_checkpoint()["network"] for name in ("whole", "pieces"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(name.startswith("gates.") for name in one)
    network, _ = load_trained(RunFolder(tmp_path / "pieces"), 4)
    assert not hasattr(network, "gates")
