"""The optimiser of a recipe: its steps, compared with a direct computation."""

import pytest
import torch
from torch import nn

from tests.training import tiny
from training.optimiser import optimiser_of

RATE, MOMENTUM, DECAY = 0.2, 0.7, 0.05


@pytest.mark.parametrize("nesterov", [False, True])
def test_it_takes_the_steps_of_the_recipe(nesterov: bool) -> None:
    """g' = g + decay x weight; v = momentum x v + g'; the step is along v, or with Nesterov along g' + momentum x v."""
    fields = {"learning_rate": RATE, "momentum": MOMENTUM, "weight_decay": DECAY, "nesterov": nesterov}
    network = nn.Linear(1, 1)
    optimiser = optimiser_of(network, tiny.recipe(optimisation=fields).optimisation)
    expected, velocity = [p.item() for p in network.parameters()], [0.0, 0.0]
    for gradients in ((1.0, -2.0), (0.5, 3.0), (-1.0, 0.1)):
        for i, (parameter, gradient) in enumerate(zip(network.parameters(), gradients, strict=True)):
            parameter.grad = torch.full_like(parameter, gradient)
            pull = gradient + DECAY * expected[i]  # biases decay, too
            velocity[i] = MOMENTUM * velocity[i] + pull
            expected[i] -= RATE * (pull + MOMENTUM * velocity[i] if nesterov else velocity[i])
        optimiser.step()
    assert [p.item() for p in network.parameters()] == pytest.approx(expected, rel=1e-5)
