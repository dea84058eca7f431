"""The steps that JEI-DNN's heads take, in warm-up and in turns, compared with a direct computation."""

import pytest
import torch
from torch import Tensor

from tests.training.test_jei import COSTS, N_CLASSES, heads, rows
from training.jei import alternation
from training.jei.alternation import alternate, warm_up
from training.jei.gates import fit_on_heldout
from training.jei.heads import Heads, cross_entropies, gated_loss, leaving
from training.jei.inputs import HeadRows, Rows
from training.jei.record import Settings

RATE, WEIGHT_DECAY = 0.01, 5e-4
ONE_BATCH = HeadRows(rows(64, 0), rows(60, 1), rows(60, 2))


def after_one_step(layers: Heads, loss: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, list(layers.parameters()))
    return [
        p.detach() - RATE * (gradient + WEIGHT_DECAY * p.detach())
        for p, gradient in zip(layers.parameters(), gradients, strict=True)
    ]


def assert_weights(layers: Heads, expected: list[Tensor]) -> None:
    for p, wanted in zip(layers.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("detached", [True, False])
def test_a_step_is_along_the_loss_that_the_gates_weight(detached: bool) -> None:
    layers, settings, train = heads(), Settings(0.3, "trained", epochs=1, detached=detached), ONE_BATCH.train
    gates = fit_on_heldout(layers.show(ONE_BATCH.heldout)[0], COSTS, settings.trade_off, settings.seed)
    logits = layers(train.inputs)
    loss = gated_loss(cross_entropies(logits, train.labels), leaving(gates.weights, logits), detached)
    expected = after_one_step(layers, loss)
    alternate(ONE_BATCH, layers, COSTS, settings)
    assert_weights(layers, expected)


def test_the_rate_falls_from_epoch_to_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, step = list[float](), alternation._step

    def noted(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        rates.append(optimiser.param_groups[0]["lr"])
        step(optimiser, loss)

    monkeypatch.setattr(alternation, "_step", noted)
    alternate(ONE_BATCH, heads(), COSTS, Settings(0.3, "trained", epochs=3))
    assert rates == pytest.approx([0.01, 0.0051, 0.0002])


def test_in_warm_up_an_exit_counts_as_often_as_exits_follow_from_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternation, "WARMUP_EPOCHS", 1)
    layers, train = heads(), ONE_BATCH.train
    losses = cross_entropies(layers(train.inputs), train.labels).mean(1)
    expected = after_one_step(layers, 3 * losses[0] + 2 * losses[1] + losses[2])
    warm_up(ONE_BATCH, layers, torch.Generator().manual_seed(0))
    assert_weights(layers, expected)


@pytest.mark.parametrize("n_epochs", [2, 6])
def test_warm_up_keeps_the_state_of_least_held_out_loss(n_epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out labels are wrong here, so that every epoch after the first makes their loss greater."""
    train = rows(600, 0)
    misled = HeadRows(train, Rows(train.inputs, (train.labels + 1) % N_CLASSES), ONE_BATCH.test)
    first, layers = heads(), heads()
    for warmed, n in ((first, 1), (layers, n_epochs)):
        monkeypatch.setattr(alternation, "WARMUP_EPOCHS", n)
        warm_up(misled, warmed, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), layers.parameters(), strict=True))
    assert all(p.requires_grad for p in layers.parameters())
