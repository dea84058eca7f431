"""L2W-DEN: loss weights that are learned beside the network. Most tests use small networks in float64."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tests.training import tiny
from training.objectives import WeightedLosses, build_objective, network_of
from training.objectives.losses import losses_by_exit
from training.objectives.weighted import WeightPredictor, early_exit_loss, exit_shares, leaving_at
from training.optimiser import after_step, optimiser_of
from training.processes import Processes
from training.recipe import Optimisation, Recipe, RecipeError, Weighting

# Modules that torch imports for forward mode use functions that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

CLASSES = 4
ALONE = Processes(0, 1, torch.device("cpu"))


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
    """An optimiser after `n_steps` steps of plain joint training."""
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
def test_the_tried_step_equals_sgds(o: Optimisation, n_steps: int) -> None:
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
    """The paper's meta objective as a function of the predictor, differentiable through the step."""
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
def test_the_predictors_gradient_is_that_of_the_loss_after_the_tried_step(o: Optimisation, mean: str) -> None:
    network = branching()
    optimiser = trained_on(network, o, 3)
    losses = weighted(network, Weighting(mean=mean))
    one, other = batch(1), batch(2)
    losses.try_step(one, other, optimiser)
    ours = [p.grad.clone() for p in losses.predictor.parameters() if p.grad is not None]

    # Reference 1: double backward through the graph of the step.
    parameters = list(losses.predictor.parameters())
    through = torch.autograd.grad(judged_after(losses, one, other, optimiser), parameters)
    for gradient, expected in zip(ours, through, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-13)

    # Reference 2: finite differences along a random direction and along the gradient.
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
    assert math.sqrt(sum(float((g * g).sum()) for g in ours)) > 1e-4  # not trivially zero


@given(
    st.integers(1, 40),
    st.integers(1, 7),
    st.floats(0.01, 1.0),
    st.sampled_from([("mat", (0, 1)), ("col", 0), ("row", 1)]),
    st.integers(0, 2**31),
)
def test_weights_average_one_and_differ_from_it_by_less_than_twice_delta(
    n_rows: int, n_exits: int, delta: float, mean: tuple[str, tuple[int, ...] | int], seed: int
) -> None:
    torch.manual_seed(seed)
    name, over = mean  # axes of [exits, rows] to average over
    predictor = WeightPredictor(n_exits, Weighting(delta=delta, mean=name)).double()  # type: ignore[arg-type]
    losses = 20 * torch.rand(n_exits, n_rows).double().requires_grad_()
    weights = predictor(losses)
    assert weights.shape == losses.shape
    assert torch.allclose(weights.mean(over), torch.ones(()).double())
    assert ((weights - 1).abs() < 2 * delta).all()
    assert weights.requires_grad
    assert torch.autograd.grad(weights.square().sum(), losses, allow_unused=True) == (
        None,
    )  # no gradient reaches the losses


def test_exit_shares_are_a_geometric_series() -> None:
    assert exit_shares(5, 0.75) == pytest.approx([0.328, 0.246, 0.184, 0.138, 0.104], abs=5e-4)  # as published
    assert exit_shares(4, 1.0) == [0.25] * 4
    assert sum(exit_shares(7, 1.7)) == pytest.approx(1)


def sure(rows: list[list[float]]) -> list[Tensor]:
    """Logits of two classes at each exit, from its confidence margin for each row."""
    return [torch.tensor([[0.0, s] for s in exit_rows]) for exit_rows in rows]


def test_the_most_confident_remaining_images_leave_at_each_exit() -> None:
    logits = sure(
        [
            [9.0, 1.0, 8.0, 2.0, 3.0, 7.0, 0.5],  # 7 rows and a ratio of 1: two leave at each of the first two exits
            [9.0, 3.0, 8.0, 6.0, 1.0, 2.0, 5.0],  # of the rows that remain, rows 3 and 6 are the most confident
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # the rest leave at the last exit
        ]
    )
    assert leaving_at(logits, 1.0).tolist() == [0, 2, 0, 1, 2, 2, 1]
    assert leaving_at(logits, 1e-9).tolist() == [0, 0, 0, 0, 0, 0, 2]  # nearly all leave at exit 1: 6 of 7 rows
    assert leaving_at([x[:1] for x in logits], 0.75).tolist() == [2]  # an exit's share of one image rounds down to none
    assert leaving_at(logits[:1], 0.75).tolist() == [0] * 7


def test_the_early_exit_loss_is_the_sum_of_mean_losses_at_the_exits_taken() -> None:
    draws = torch.Generator().manual_seed(4)
    logits = [torch.randn(10, 3, generator=draws) for _ in range(4)]
    labels = torch.randint(0, 3, (10,), generator=draws)
    exits = leaving_at(logits, 0.75)
    assert exits.bincount(minlength=4).tolist() == [3, 2, 2, 3]
    expected = [functional.cross_entropy(x[exits == n], labels[exits == n]) for n, x in enumerate(logits)]
    assert early_exit_loss(logits, labels, 0.75).item() == pytest.approx(sum(expected).item(), rel=1e-6)  # type: ignore[union-attr]
    alone = early_exit_loss(
        [x[:1] for x in logits], labels[:1], 0.75
    )  # leaves at the last exit; the others have no images
    assert alone.item() == pytest.approx(functional.cross_entropy(logits[3][:1], labels[:1]).item(), rel=1e-6)


def test_the_loss_is_the_weighted_sum_and_the_joint_loss_for_weights_of_one() -> None:
    torch.manual_seed(0)
    network = Branching().train()
    rows, labels = batch(0)[0].float(), batch(0)[1]
    losses = WeightedLosses(network, 3, Weighting())
    found = losses_by_exit(network(rows), labels, 0.0)
    total, statistics = losses(network, rows, labels)
    assert total.item() == pytest.approx((losses.predictor(found) * found).mean(1).sum().item(), rel=1e-6)
    assert total.item() != pytest.approx(found.mean(1).sum().item(), rel=1e-4)
    assert torch.allclose(statistics[0], found.mean(1), rtol=1e-6)  # the logged losses are unweighted, as for joint
    total.backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(p.grad is None for p in losses.predictor.parameters())
    with torch.no_grad():
        for p in losses.predictor.layers[2].parameters():  # type: ignore[union-attr]
            p.zero_()
    assert losses(network, rows, labels)[0].item() == pytest.approx(found.mean(1).sum().item(), rel=1e-6)


def test_trying_a_step_changes_neither_network_nor_optimiser() -> None:
    network = branching()
    optimiser = trained_on(network, SETTINGS[0], 2)
    optimiser.zero_grad()
    before = copy.deepcopy((network.state_dict(), optimiser.state_dict()))
    parameters = list(network.parameters())
    losses = weighted(network)
    losses.try_step(batch(1), batch(2), optimiser)
    network_state, optimiser_state = before
    assert network_state.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():  # including batch statistics and their counts
        assert torch.equal(value, network_state[name]), name
    for key, state in optimiser_state["state"].items():
        assert torch.equal(state["momentum_buffer"], optimiser.state_dict()["state"][key]["momentum_buffer"])
    assert optimiser_state["state"].keys() == optimiser.state_dict()["state"].keys()
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert all(p.grad is None for p in parameters)
    assert network.training


def test_trying_the_first_step_creates_no_optimiser_state() -> None:
    network = branching()
    optimiser = optimiser_of(network, SETTINGS[0])
    weighted(network).try_step(batch(1), batch(2), optimiser)
    assert len(optimiser.state) == 0


@pytest.mark.parametrize("rescaling", ["off", "coarsest", "all"])
@pytest.mark.parametrize("architecture", ["msdnet", "ranet"])
def test_forward_mode_agrees_with_double_backward_in_real_networks(architecture: str, rescaling: str) -> None:
    """Gradient rescaling is invisible in the forward pass, and forward mode must apply it as well."""
    arguments: dict[str, object] = (
        {"config": "C-m1", "n_channels": 4, "growth_rate": 4} if architecture == "ranet" else {}
    )
    recipe = tiny.recipe(
        n_exits=3,
        objective={"name": "weighted", "gradient_rescaling": rescaling},
        **({"network": {"architecture": "ranet", "arguments": arguments}} if arguments else {}),
    )
    torch.manual_seed(0)
    network = network_of(recipe, CLASSES).train()
    losses = build_objective(recipe.objective, network)
    assert isinstance(losses, WeightedLosses)
    optimiser = optimiser_of(network, recipe.optimisation)
    draws = torch.Generator().manual_seed(5)
    one, other = (
        (torch.randn(8, 3, 32, 32, generator=draws), torch.randint(0, CLASSES, (8,), generator=draws)) for _ in range(2)
    )
    losses.try_step(one, other, optimiser)
    parameters = list(losses.predictor.parameters())
    expected = torch.autograd.grad(judged_after(losses, one, other, optimiser), parameters)
    for p, gradient in zip(parameters, expected, strict=True):
        assert p.grad is not None
        assert (p.grad - gradient).norm() < 1e-3 * gradient.norm()


def test_learning_the_predictor_lowers_the_meta_objective() -> None:
    network = branching()
    optimiser = trained_on(network, SETTINGS[0], 3)
    losses = weighted(network, Weighting(learning_rate=1e-2, weight_decay=0.0))
    judged = []
    for _ in range(60):
        losses.try_step(batch(1), batch(2), optimiser)
        losses.learn(0.0, ALONE)
        judged.append(judged_after(losses, batch(1), batch(2), optimiser).item())
    assert judged[-1] < judged[0] - 0.01


def test_the_predictors_learning_rate_follows_a_cosine() -> None:
    losses = weighted(branching(), Weighting(learning_rate=0.2))
    for share, rate in ((0.0, 0.2), (0.5, 0.1), (1.0, 0.0)):
        losses.learn(share, ALONE)
        assert losses.optimiser.param_groups[0]["lr"] == pytest.approx(rate)
    assert losses.optimiser.param_groups[0]["weight_decay"] == 1e-4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "weighted", "distillation": 0.5}}, "leave out distillation and gates"),
        ({"objective": {"name": "weighted", "gates": 0.1}}, "leave out distillation and gates"),
        ({"objective": {"name": "weighted", "learned_temperatures": True}}, "weighted is t = 0"),
        ({"objective": {"name": "joint", "weighting": {"delta": 0.3}}}, "weighting belongs to weighted, not joint"),
        ({"objective": {"name": "weighted"}, "numerics": {"compile": "default"}}, "compile = 'off'"),
        ({"objective": {"name": "weighted", "weighting": {"mean": "exit"}}}, r"objective\.weighting\.mean"),
        (
            {"objective": {"name": "weighted", "weighting": {"meta_interval": 0}}},
            r"objective\.weighting\.meta_interval",
        ),
        ({"objective": {"name": "weighted", "weighting": {"delta": 1.5}}}, r"objective\.weighting\.delta"),
    ],
)
def test_settings_that_contradict_the_weighting_are_refused(sections: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.recipe(**sections)


def test_an_unknown_field_of_the_weighting_is_named(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "tiny.toml")
    with pytest.raises(RecipeError, match=r"objective\.weighting\.rate: there is no such field; choose from .*ratio"):
        Recipe.load(str(path), ["objective.name='weighted'", "objective.weighting.rate=1.0"])
