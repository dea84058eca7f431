"""L2W-DEN: weights that are learned beside the network. Small networks in float64 stand for large ones in float32."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from training.objectives import WeightedLosses
from training.objectives.losses import losses_by_exit
from training.objectives.weighted import early_exit_loss
from training.optimiser import after_step, optimiser_of
from training.recipe import Optimisation, Weighting

# What torch loads for forward mode declares itself with what torch calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

CLASSES = 4


class Branching(nn.Module):
    """Three exits, batch statistics, and a float64 result: small enough to differentiate by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(a, 6), nn.BatchNorm1d(6), nn.Tanh()) for a in (5, 6, 6))
        self.heads = nn.ModuleList(nn.Linear(6, CLASSES) for _ in range(3))

    def forward(self, rows: Tensor) -> list[Tensor]:
        logits = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            rows = block(rows)
            logits.append(head(rows))
        return logits


def branching(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Branching().double().train()


def batch(seed: int, n_rows: int = 24) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, 5, generator=draws).double(), torch.randint(0, CLASSES, (n_rows,), generator=draws)


def weighted(network: nn.Module, weighting: Weighting | None = None) -> WeightedLosses:
    losses = WeightedLosses(network, 3, weighting or Weighting())
    losses.predictor.double()
    return losses


def trained_on(network: nn.Module, o: Optimisation, n_steps: int) -> torch.optim.SGD:
    """An optimiser that has taken so many steps of plain joint training."""
    optimiser = optimiser_of(network, o)
    for step in range(n_steps):
        rows, labels = batch(100 + step)
        optimiser.zero_grad()
        losses_by_exit(network(rows), labels, 0.0).mean(1).sum().backward()
        optimiser.step()
    return optimiser


SETTINGS = [
    Optimisation(learning_rate=0.3, momentum=0.9, weight_decay=0.01),
    Optimisation(learning_rate=0.3, momentum=0.9, weight_decay=0.01, nesterov=True),
    Optimisation(learning_rate=0.3, momentum=0.0, weight_decay=0.0),
]
NAMES = ["momentum", "Nesterov", "plain"]


@pytest.mark.parametrize("n_steps", [0, 3], ids=["first step", "later"])
@pytest.mark.parametrize("o", SETTINGS, ids=NAMES)
def test_the_tried_step_is_the_one_that_sgd_would_take(o: Optimisation, n_steps: int) -> None:
    network = branching()
    optimiser = trained_on(network, o, n_steps)
    rows, labels = batch(0)
    optimiser.zero_grad()
    losses_by_exit(network(rows), labels, 0.0).mean(1).sum().backward()
    before = [p.detach().clone() for p in network.parameters()]
    moved = after_step(optimiser, {p: p.grad for p in network.parameters() if p.grad is not None})
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    optimiser.step()
    for p in network.parameters():
        assert torch.allclose(moved[p], p, rtol=1e-12, atol=1e-12)


def judged_after(
    losses: WeightedLosses, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], optimiser: torch.optim.SGD
) -> Tensor:
    """The meta objective as a function of the predictor alone, with the graph of the step: what the paper writes."""
    network = losses.network
    named = dict(network.named_parameters())
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    start = {name: p.detach().requires_grad_() for name, p in named.items()}
    found = losses_by_exit(functional_call(network, (start, buffers), (one[0],)), one[1], 0.0)
    total = (losses.predictor(found) * found).mean(1).sum()
    gradients = torch.autograd.grad(total, list(start.values()), create_graph=True)
    moved = after_step(optimiser, dict(zip(named.values(), gradients, strict=True)))
    there = {name: moved[p] for name, p in named.items()}
    logits = functional_call(network, (there, buffers), (other[0],))
    return early_exit_loss(logits, other[1], losses.weighting.ratio)


@pytest.mark.parametrize("mean", ["mat", "col", "row"])
@pytest.mark.parametrize("o", SETTINGS, ids=NAMES)
def test_the_predictors_gradient_is_that_of_the_loss_after_the_step(o: Optimisation, mean: str) -> None:
    network = branching()
    optimiser = trained_on(network, o, 3)
    losses = weighted(network, Weighting(mean=mean))
    one, other = batch(1), batch(2)
    losses.try_step(one, other, optimiser)
    ours = [p.grad.clone() for p in losses.predictor.parameters() if p.grad is not None]

    # Through the graph of the step: a backward pass of a backward pass.
    parameters = list(losses.predictor.parameters())
    through = torch.autograd.grad(judged_after(losses, one, other, optimiser), parameters)
    for gradient, expected in zip(ours, through, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-13)

    # And by trying it: along a random direction, and along the gradient itself.
    draws = torch.Generator().manual_seed(3)
    random = [torch.randn(p.shape, generator=draws).double() for p in parameters]
    for direction in (random, ours):
        length = math.sqrt(sum(float((d * d).sum()) for d in direction))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += sign * 1e-5 / length * d
            ends.append(judged_after(losses, one, other, optimiser).item())
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p -= sign * 1e-5 / length * d
        tried = (ends[0] - ends[1]) / 2e-5
        expected = sum(float((g * d).sum()) for g, d in zip(ours, direction, strict=True)) / length
        assert tried == pytest.approx(expected, rel=1e-4, abs=1e-10)
    assert math.sqrt(sum(float((g * g).sum()) for g in ours)) > 1e-4  # it is no matter of zeros
