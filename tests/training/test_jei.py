"""JEI-DNN's targets, class weights, losses and turns, each alone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from models.boosting import Boosting
from models.exits import take_exits
from models.gates import GATE_FEATURES
from training.jei import alternation
from training.jei.alternation import alternate
from training.jei.gates import (
    Shown,
    best_exits,
    class_weights,
    fit_gates,
    fit_on_heldout,
    fit_on_training,
    gate_targets,
)
from training.jei.heads import Heads, cross_entropies, gated_loss, leaving
from training.jei.inputs import HeadRows, Rows
from training.jei.record import Settings, published_decision, published_thresholds

COSTS = (0.25, 0.5, 1.0)
N_EXITS, WIDTH, N_CLASSES = 3, 6, 4


def shown(n_images: int, seed: int = 0) -> Shown:
    """Images whose losses fall with depth, by more the less confident exit 1 is."""
    draw = np.random.default_rng(seed)
    features = draw.random((n_images, N_EXITS, len(GATE_FEATURES)))
    losses = 2.0 * (1 - features[:, :1, 0]) * np.array([1.0, 0.7, 0.4]) + 0.3 * draw.random((n_images, N_EXITS))
    return Shown(features, losses)


def rows(n_images: int, seed: int) -> Rows:
    """Inputs of three heads that show the class more clearly with depth."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_images) % N_CLASSES
    told = functional.one_hot(labels, WIDTH).float()
    return Rows([s * told + torch.randn(told.shape, generator=draw) for s in (1.0, 1.5, 2.5)], labels)


def head_rows() -> HeadRows:
    return HeadRows(rows(600, 0), rows(300, 1), rows(200, 2))


def heads(seed: int = 0) -> Heads:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Heads([nn.Linear(WIDTH, N_CLASSES) for _ in range(N_EXITS)], Boosting([0.5] * N_EXITS))


def test_the_best_exit_minimises_loss_plus_cost_and_gates_open_from_there_on() -> None:
    losses = np.array([[0.1, 0.1, 0.1], [2.0, 0.2, 0.1], [2.0, 1.9, 0.1]])
    best = best_exits(losses, COSTS, 0.5)
    assert best.tolist() == [0, 1, 2]
    assert best_exits(losses, COSTS, 10.0).tolist() == [0, 0, 0]
    assert best_exits(losses, COSTS, 0.0).tolist() == [0, 2, 2]
    assert gate_targets(best, 3).tolist() == [[True, True], [False, True], [False, False]]


def test_class_weights_are_the_odds_against_each_exit_being_best_up_to_five() -> None:
    best = np.array([0] * 6 + [1] * 1 + [3] * 3)
    weights = class_weights(best, 4)
    assert weights == pytest.approx([4 / 6, 5.0, 5.0])  # 9 and infinity are clipped to 5
    assert class_weights(np.ones(10, np.intp), 3).tolist() == [5.0, 1.0]  # and not 0 without negatives


def test_all_images_leave_at_an_exit_that_is_best_for_all() -> None:
    seen = shown(200)
    gates = fit_on_heldout(seen, COSTS, 1000.0, seed=0)  # going on costs more than any loss
    kept = gates.scores(seen.features).astype(np.float32)  # as stored in a run
    done = published_decision(kept, np.ones((200, N_EXITS), np.bool_), COSTS)
    assert done.shares[0] == 1.0


def test_fitted_gates_minimise_the_published_loss() -> None:
    seen = shown(3000)
    fitted = fit_gates(seen, COSTS, 0.3)
    best = best_exits(seen.losses, COSTS, 0.3)
    targets, counts = gate_targets(best, N_EXITS), class_weights(best, N_EXITS)
    assert not fitted[-1].any()
    for i in range(N_EXITS - 1):
        x = torch.from_numpy(seen.features[:, i])
        layer = torch.from_numpy(fitted[i]).requires_grad_()
        wanted, weight = torch.from_numpy(targets[:, i]).double(), torch.tensor(counts[i])
        loss = functional.binary_cross_entropy_with_logits(x @ layer[:-1] + layer[-1], wanted, pos_weight=weight)
        loss.backward()
        assert layer.grad is not None
        assert layer.grad.abs().max() < 3e-3  # not exactly 0, because of the ridge of 3 images
        assert 0.05 < wanted.mean() < 0.95


def test_class_weights_may_come_from_other_images() -> None:
    train, heldout = shown(800), shown(400, 5)
    heldout.losses[:] = 1.0  # exit 1 is best for each
    weights = fit_on_training(train, heldout, COSTS, 0.3).weights
    assert np.array_equal(weights, fit_gates(train, COSTS, 0.3, heldout))
    assert (weights[0] != fit_gates(train, COSTS, 0.3)[0]).all()


def test_held_out_images_are_scored_by_gates_fitted_without_them() -> None:
    seen = shown(500)
    gates = fit_on_heldout(seen, COSTS, 0.3, seed=0)
    judged = gates.scores(seen.features)
    changed = Shown(seen.features, seen.losses.copy())
    changed.losses[gates.fold == 2] = np.random.default_rng(9).random((int((gates.fold == 2).sum()), N_EXITS)) * 3
    other = fit_on_heldout(changed, COSTS, 0.3, seed=0)
    assert np.array_equal(other.by_fold[2], gates.by_fold[2])
    assert np.array_equal(other.scores(changed.features)[gates.fold == 2], judged[gates.fold == 2])
    assert not np.array_equal(other.weights, gates.weights)
    assert np.bincount(gates.fold).tolist() == [100] * 5


def gradient_of(detached: bool, weighted: bool = True) -> torch.Tensor:
    part, layers = rows(64, 3), heads()
    logits = layers(part.inputs)
    losses = cross_entropies(logits, part.labels)
    gates = np.array([[2.0, -1.0, 1.0, 0.0, -0.5]] * (N_EXITS - 1) + [[0.0] * 5])
    loss = gated_loss(losses, leaving(gates, logits), detached) if weighted else losses.sum(0).mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in layers.parameters() if p.grad is not None])


def test_detached_gates_weight_the_heads_loss_and_the_published_form_does_not() -> None:
    unweighted = gradient_of(detached=True, weighted=False)
    assert unweighted.abs().max() > 0.01
    assert (gradient_of(detached=True) - unweighted).abs().max() > 0.01
    assert (gradient_of(detached=False) - unweighted).abs().max() < 1e-5


@pytest.mark.parametrize("detached", [True, False])
def test_the_gated_loss_is_normalised_and_finite_without_leaving_images(detached: bool) -> None:
    losses = torch.tensor([[0.5, 2.0], [0.25, 1.0]], requires_grad=True)
    assert gated_loss(losses, torch.tensor([[0.9, 0.2], [0.1, 0.8]]), detached).item() == pytest.approx(
        3.75 / 2, rel=1e-4
    )
    nobody = gated_loss(losses, torch.zeros(2, 2), detached)
    nobody.backward()
    assert nobody.item() == 0
    assert losses.grad is not None
    assert torch.isfinite(losses.grad).all()
    certain = torch.zeros(2, 2, requires_grad=True)
    gated_loss(certain, torch.full((2, 2), 0.5), detached).backward()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


def test_heads_get_no_gradient_from_later_exits() -> None:
    part, layers = rows(16, 3), heads()
    cross_entropies(layers(part.inputs), part.labels)[2].sum().backward()
    assert [layer.weight.grad is None or not layer.weight.grad.any() for layer in layers.layers] == [True, True, False]


def test_heads_give_the_ensembles_logits() -> None:
    part, layers = rows(16, 3), heads()
    first, second, third = (layer(x) for layer, x in zip(layers.layers, part.inputs, strict=True))
    assert torch.allclose(layers(part.inputs)[2], third + 0.5 * (second + 0.5 * first), atol=1e-6)


def test_the_turn_with_the_best_held_out_accuracy_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternation, "TURN_STEPS", 5)
    seen, settings = head_rows(), Settings(0.3, "trained", epochs=3)
    made = alternate(seen, heads(), COSTS, settings)
    assert [turn.step for turn in made.turns] == [0, 5, 10, 15, 20, 25, 30]
    assert made.turns[made.kept].accuracy == max(turn.accuracy for turn in made.turns)
    assert made.kept > 0  # these heads start untrained
    now, correct = made.heads.show(seen.heldout)
    exits = take_exits(made.gates.scores(now.features), published_thresholds(N_EXITS))
    assert correct[np.arange(300), exits].mean() == pytest.approx(made.turns[made.kept].accuracy)
    again = alternate(seen, heads(), COSTS, settings)
    assert (again.turns, again.kept) == (made.turns, made.kept)
    assert np.array_equal(again.gates.weights, made.gates.weights)
    assert alternate(seen, heads(), COSTS, Settings(0.3, "trained", epochs=3, seed=1)).turns != made.turns


@pytest.mark.parametrize("gates_on", ["heldout", "training"])
def test_with_heads_kept_their_weights_are_unchanged(gates_on: str) -> None:
    layers = heads()
    made = alternate(head_rows(), layers, COSTS, Settings(0.3, "kept", gates_on))  # type: ignore[arg-type]
    assert len(made.turns) == 1
    for before, after in zip(heads().parameters(), made.heads.parameters(), strict=True):
        assert torch.equal(before, after)


def test_fresh_heads_do_not_depend_on_the_given_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternation, "TURN_STEPS", 10)
    seen = head_rows()
    made = [alternate(seen, heads(seed), COSTS, Settings(0.3, "fresh", epochs=1)) for seed in (0, 1)]
    assert made[0].turns == made[1].turns
    _, correct = made[0].heads.show(seen.test)
    assert correct.mean(axis=0)[-1] > 0.8


def test_a_lower_trade_off_spends_more_compute() -> None:
    costs = [
        alternate(head_rows(), heads(), COSTS, Settings(trade_off, "kept")).turns[0].cost_share
        for trade_off in (0.0, 0.3, 10.0)
    ]
    assert costs[0] > costs[1] >= costs[2] == pytest.approx(COSTS[0])
