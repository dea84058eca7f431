"""Alternation: gates are fitted to the heads' outputs, then heads are trained on the images that the gates send them.

A turn fits all gates, then takes `TURN_STEPS` steps of the heads. After each fit the accuracy of gated answers is
measured on held-out images, and the best turn is kept.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import RunError
from training.jei.gates import Floats, FoldedGates, fit_on_heldout, fit_on_training
from training.jei.heads import Heads, batches, cross_entropies, gated_loss, leaving, optimiser_of, rate_of
from training.jei.inputs import HeadRows
from training.jei.record import Settings, Turn, published_decision

TURN_STEPS = 200
WARMUP_EPOCHS, WARMUP_PATIENCE = 6, 2


@dataclass(frozen=True)
class Alternated:
    heads: Heads
    gates: FoldedGates
    turns: tuple[Turn, ...]
    kept: int  # index of the turn whose heads and gates these are


class _Turns:
    """Fits gates to the current heads, measures both, and keeps a copy of the best."""

    def __init__(self, rows: HeadRows, heads: Heads, cost_shares: Sequence[float], settings: Settings) -> None:
        self.rows, self.heads, self.cost_shares, self.settings = rows, heads, cost_shares, settings
        self.turns: list[Turn] = []
        self.kept = 0
        self.best: tuple[Heads, FoldedGates] | None = None

    def take(self, step: int, losses: Sequence[float]) -> Floats:
        """Fit gates to the heads after `step` steps and return them [N, 5]; `losses` are those since the last turn."""
        s = self.settings
        heldout, correct = self.heads.show(self.rows.heldout)
        if s.gates_on == "heldout":
            gates = fit_on_heldout(heldout, self.cost_shares, s.trade_off, s.seed)
        else:
            train, _ = self.heads.show(self.rows.train)
            gates = fit_on_training(train, heldout, self.cost_shares, s.trade_off)
        done = published_decision(gates.scores(heldout.features), correct, self.cost_shares)
        self.turns.append(Turn(step, done.accuracy, done.mean_cost, float(np.mean(losses)) if losses else None))
        if self.best is None or done.accuracy > self.turns[self.kept].accuracy:
            self.kept, self.best = len(self.turns) - 1, (copy.deepcopy(self.heads), gates)
        return gates.weights


def alternate(rows: HeadRows, heads: Heads, cost_shares: Sequence[float], settings: Settings) -> Alternated:
    """Train `heads` in place, alternating with gates; return the heads and gates of the best turn.

    Args:
        cost_shares: [N], cumulative cost of stopping at each exit, as a share of the last exit's.

    Raises:
        RunError: the loss is no longer finite.
    """
    draws = torch.Generator().manual_seed(settings.seed)
    if settings.heads == "fresh":
        heads.start_afresh(settings.seed)
        warm_up(rows, heads, draws)
    turns = _Turns(rows, heads, cost_shares, settings)
    optimiser = optimiser_of(heads)
    epochs = 0 if settings.heads == "kept" else settings.epochs
    step = 0
    losses: list[float] = []
    with tqdm(total=epochs * len(rows.train), unit="image", unit_scale=True, desc="turns", disable=None) as bar:
        for epoch in range(epochs):
            optimiser.param_groups[0]["lr"] = rate_of(epoch, epochs)
            for inputs, labels in batches(rows.train, draws):
                if step % TURN_STEPS == 0:
                    gates = turns.take(step, losses)
                    bar.set_postfix_str(f"held-out top-1 {100 * turns.turns[-1].accuracy:.2f} %")
                    losses.clear()
                logits = heads(inputs)
                probabilities = leaving(gates, logits)
                loss = gated_loss(cross_entropies(logits, labels), probabilities, settings.detached)
                _step(optimiser, loss)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise RunError(f"at step {step} the loss of the last layers is no longer finite")
                step += 1
                bar.update(len(labels))
    turns.take(step, losses)
    assert turns.best is not None
    return Alternated(*turns.best, tuple(turns.turns), turns.kept)


def warm_up(rows: HeadRows, heads: Heads, draws: torch.Generator) -> None:
    """Train fresh layers without gates; the loss of exit 1 has weight N, each later one's weight is one less.

    A layer whose held-out loss has not improved for `WARMUP_PATIENCE` epochs is frozen at its best state.
    """
    n_exits = len(heads.layers)
    counts = torch.arange(n_exits, 0, -1.0)
    optimiser = optimiser_of(heads)
    least, stale = np.full(n_exits, np.inf), np.zeros(n_exits, dtype=int)
    best = [copy.deepcopy(layer.state_dict()) for layer in heads.layers]
    for _ in tqdm(range(WARMUP_EPOCHS), unit="epoch", desc="warm-up", disable=None):
        for inputs, labels in batches(rows.train, draws):
            _step(optimiser, (counts * cross_entropies(heads(inputs), labels).mean(1)).sum())
        losses = heads.show(rows.heldout)[0].losses.mean(axis=0)
        for i in np.flatnonzero(stale < WARMUP_PATIENCE).tolist():
            better = losses[i] < least[i]
            stale[i] = 0 if better else stale[i] + 1
            if better:
                least[i], best[i] = losses[i], copy.deepcopy(heads.layers[i].state_dict())
            if stale[i] == WARMUP_PATIENCE:
                heads.layers[i].load_state_dict(best[i])
                heads.layers[i].requires_grad_(False)
        if (stale >= WARMUP_PATIENCE).all():
            break
    for layer, state in zip(heads.layers, best, strict=True):
        layer.load_state_dict(state)
    heads.requires_grad_()


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
