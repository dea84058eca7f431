import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.training import tiny
from training.objectives import ExitLosses, build_objective, network_arguments, network_of


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n) % 4


def trained_network(objective: dict, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return network_of(tiny.recipe(n_exits=3, objective=objective), n_classes=4).train()


def gradients(network: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_joint_is_boosted_with_temperature_zero() -> None:
    joint = tiny.recipe(objective={"name": "joint", "temperatures": [0.5]})
    assert network_arguments(joint, 4)["temperatures"] == [0.0]
    assert network_arguments(tiny.recipe(), 4)["temperatures"] == [0.5]


def test_without_temperature_and_rescaling_it_is_a_plain_network_with_exits() -> None:
    images, labels = batch()
    objective = {"name": "joint", "gradient_rescaling": "off"}
    ours = trained_network(objective)
    loss, (per_exit, _) = build_objective(tiny.recipe(objective=objective).objective)(ours, images, labels)
    our_gradients = gradients(ours, loss)

    plain = trained_network(objective)  # the same weights, run by hand: no ensemble, no rescaling
    maps, losses = plain.stem(images), []
    for block, head in zip(plain.blocks, plain.heads, strict=True):
        maps = block(maps)
        losses.append(functional.cross_entropy(head(maps[-1]), labels))
    plain_gradients = gradients(plain, sum(losses))

    assert torch.allclose(per_exit, torch.stack(losses).detach(), rtol=1e-6, atol=0)
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in our_gradients.items():
        assert torch.allclose(gradient, plain_gradients[name], rtol=1e-4, atol=1e-7), name


def test_boosted_losses_are_the_ensembles_and_reach_only_their_own_head() -> None:
    images, labels = batch()
    objective = {"temperatures": [0.5], "gradient_rescaling": "off"}
    network = trained_network(objective)
    _, (per_exit, _) = build_objective(tiny.recipe(objective=objective).objective)(network, images, labels)

    maps, heads = network.stem(images), []
    for block, head in zip(network.blocks, network.heads, strict=True):
        maps = block(maps)
        heads.append(head(maps[-1]))
    ensembled = [heads[0], 0.5 * heads[0] + heads[1], 0.25 * heads[0] + 0.5 * heads[1] + heads[2]]
    expected = torch.stack([functional.cross_entropy(x, labels) for x in ensembled])
    assert torch.allclose(per_exit, expected, atol=1e-6)

    reached = gradients(network, functional.cross_entropy(network(images)[2], labels))
    assert not any(torch.any(reached[name] != 0) for name in reached if name.startswith(("heads.0", "heads.1")))
    assert any(torch.any(reached[name] != 0) for name in reached if name.startswith("heads.2"))


def test_without_detaching_a_loss_reaches_earlier_heads() -> None:
    images, labels = batch()
    network = trained_network({"stop_gradient": False})
    reached = gradients(network, functional.cross_entropy(network(images)[2], labels))
    for head in ("heads.0", "heads.1", "heads.2"):
        assert any(torch.any(reached[name] != 0) for name in reached if name.startswith(head)), head


def test_the_loss_is_the_sum_over_the_exits() -> None:
    images, labels = batch()
    total, (per_exit, _) = build_objective(tiny.recipe().objective)(trained_network({}), images, labels)
    assert total.item() == pytest.approx(per_exit.sum().item())


def test_label_smoothing_applies_to_every_exit() -> None:
    images, labels = batch()
    network = trained_network({})
    smoothed = build_objective(tiny.recipe(objective={"label_smoothing": 0.2}).objective)
    _, (per_exit, _) = smoothed(network, images, labels)
    expected = [functional.cross_entropy(x, labels, label_smoothing=0.2) for x in network(images)]
    assert torch.allclose(per_exit, torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_losses_are_float32_under_autocast(dtype: torch.dtype) -> None:
    images, labels = batch()
    network = trained_network({})
    with torch.autocast("cpu", dtype=dtype):
        loss, statistics = build_objective(tiny.recipe().objective)(network, images, labels)
    assert loss.dtype == statistics.dtype == torch.float32


def test_valid_samples_are_those_with_a_loss_above_the_tenth_percentile_of_exit_one() -> None:
    images, labels = batch()
    network = trained_network({})
    _, (_, shares) = build_objective(tiny.recipe().objective)(network, images, labels)
    losses = [functional.cross_entropy(x, labels, reduction="none").detach().numpy() for x in network(images)]
    threshold = np.percentile(losses[0], 10)
    assert shares.tolist() == pytest.approx([float((x > threshold).mean()) for x in losses])
    assert 0.8 < shares[0] < 1


def test_distillation_pulls_earlier_exits_to_the_last_and_leaves_the_last_alone() -> None:
    images, labels = batch()
    network = trained_network({"name": "joint"})
    plain, _ = ExitLosses()(network, images, labels)
    distilled, _ = ExitLosses(distillation=0.7, distillation_temperature=3.0)(network, images, labels)
    teacher = functional.softmax(network(images)[-1] / 3, 1)
    expected = sum(
        functional.kl_div(functional.log_softmax(x / 3, 1), teacher, reduction="batchmean")
        for x in network(images)[:-1]
    )
    assert isinstance(expected, torch.Tensor)
    assert (distilled - plain).item() == pytest.approx(0.7 * 9 * expected.item(), rel=1e-4)
    before, after = gradients(network, plain), gradients(network, distilled)
    assert all(torch.allclose(before[name], after[name]) for name in before if name.startswith("heads.2"))
    assert not all(torch.allclose(before[name], after[name]) for name in before if name.startswith("heads.0"))
