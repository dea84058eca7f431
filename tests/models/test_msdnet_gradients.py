"""Gradients of a boosted MSDNet: Eq. 7 on the coarsest path, unchanged in heads, and the same when compiled."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from models.boosting import Rescaling
from models.msdnet import CONFIGS, MSDLayer, MSDNet

N_EXITS = 4
CONFIG = replace(CONFIGS["C-batch-4"], n_classes=7, n_blocks=N_EXITS, base=2, step=1, n_channels=4, growth_rate=4)
COMPILED = replace(CONFIG, n_blocks=3, base=1, bottleneck=False)  # every operation takes long to compile
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 7, (8,), generator=generator)


def network(rescaling: Rescaling, temperatures: float | Sequence[float] = 0.5) -> MSDNet:
    torch.manual_seed(0)
    return MSDNet(CONFIG, temperatures, rescaling).train()


def losses(outputs: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    return [functional.cross_entropy(logits, labels) for logits in outputs]


def gradients(model: nn.Module, loss: Tensor) -> Gradients:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def on_coarsest_path(model: MSDNet, block: int) -> list[str]:
    """Parameters whose map is only read at the coarsest scale, so that all their gradient takes the coarsest path."""
    names = []
    for index, layer in enumerate(model.blocks[block]):  # type: ignore[arg-type]
        if isinstance(layer, MSDLayer):
            coarsest = layer.same[-1]
            names += [
                f"blocks.{block}.{index}.same.{len(layer.same) - 1}.{name}" for name, _ in coarsest.named_parameters()
            ]
    return names


@pytest.mark.parametrize("exit_number", range(1, N_EXITS + 1))
def test_on_the_coarsest_path_equation_7_holds_exactly(exit_number, batch):
    """Loss j reaches block i with weight 1 / (N - i), i from 0, whatever the loss."""
    images, labels = batch
    scaled, plain = network("coarsest"), network("off")
    with_rescaling = gradients(scaled, losses(scaled(images), labels)[exit_number - 1])
    without = gradients(plain, losses(plain(images), labels)[exit_number - 1])
    for block in range(exit_number):
        names = on_coarsest_path(scaled, block)
        assert names
        for name in names:
            torch.testing.assert_close(
                with_rescaling[name], without[name] / (N_EXITS - block), rtol=1e-4, atol=1e-7, msg=name
            )


@settings(max_examples=5)
@given(temperatures=st.lists(st.floats(0.1, 1.5), min_size=N_EXITS, max_size=N_EXITS))
def test_rescaling_changes_neither_head_gradients_nor_outputs(temperatures):
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 7, (4,), generator=generator)
    plain = network("off", temperatures)
    expected = plain(images)
    for rescaling in ("coarsest", "all"):
        scaled = network(rescaling, temperatures)
        outputs = scaled(images)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        for loss, plain_loss in zip(losses(outputs, labels), losses(expected, labels), strict=True):
            found, wanted = gradients(scaled, loss), gradients(plain, plain_loss)
            assert found.keys() == wanted.keys()
            for name in (name for name in found if name.startswith("heads")):
                assert torch.equal(found[name], wanted[name])


class PlainMultiExit(nn.Module):
    """The same parts without ensemble and rescaling."""

    def __init__(self, parts: MSDNet) -> None:
        super().__init__()
        self.stem, self.blocks, self.heads = parts.stem, parts.blocks, parts.heads

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, logits = self.stem(images), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            maps = block(maps)
            logits.append(head(maps[-1]))
        return logits


def test_without_temperature_and_rescaling_it_is_a_plain_network(batch):
    images, labels = batch
    boosted = network("off", 0.0)
    plain = PlainMultiExit(copy.deepcopy(boosted))
    found, wanted = losses(boosted(images), labels), losses(plain(images), labels)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    gradients_found = gradients(boosted, torch.stack(found).sum())
    for name, gradient in gradients(plain, torch.stack(wanted).sum()).items():
        assert torch.equal(gradients_found[name], gradient), name


@pytest.mark.parametrize("rescaling", ["coarsest", "all"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside torch.compile
def test_a_compiled_network_has_the_same_gradients(rescaling, batch):
    images, labels = batch
    torch.manual_seed(0)
    eager = MSDNet(COMPILED, 0.5, rescaling).train()
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    wanted = gradients(eager, torch.stack(losses(eager(images), labels)).sum())
    torch.stack(losses(run(images), labels)).sum().backward()
    for name, parameter in compiled.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@settings(max_examples=10)
@given(temperatures=st.lists(st.floats(-1, 2), min_size=N_EXITS, max_size=N_EXITS))
def test_training_and_evaluation_mode_give_the_same_ensemble(temperatures):
    """With fixed normalisation, both modes give bitwise equal results for any temperatures."""
    model = network("coarsest", temperatures)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    trained = model(images)
    for a, b in zip(trained, model.eval()(images), strict=True):
        assert torch.equal(a, b)
