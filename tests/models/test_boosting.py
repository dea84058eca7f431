"""The boosted recursion, where its gradients go, and gradient rescaling (BoostNet sections 3.1 and 3.2, IMTA)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from models.boosting import Boosting, rescale_gradient, temperatures_per_exit
from models.msdnet import CONFIGS, MSDNet, Rescaling

TEMPERATURES = st.lists(st.floats(-2, 2, allow_nan=False), min_size=1, max_size=8)


def head_logits(n_exits: int, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n_exits)
    return [torch.randn(4, 5, generator=generator, requires_grad=requires_grad) for _ in range(n_exits)]


@given(TEMPERATURES)
def test_recursion_equals_its_closed_form(temperatures: list[float]) -> None:
    """F_n = sum over m <= n of (product of t_(m+1)..t_n) f_m; for one t that is t^(n-m)."""
    heads = head_logits(len(temperatures))
    ensembled = Boosting(temperatures).eval()(heads)
    for n, logits in enumerate(ensembled):
        expected = sum(math.prod(temperatures[m + 1 : n + 1]) * heads[m].double() for m in range(n + 1))
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-4)


@given(TEMPERATURES)
def test_training_and_serving_use_the_same_recursion(temperatures: list[float]) -> None:
    """In the released code, t differs by one exit between the two; here it cannot, for any temperatures."""
    heads = head_logits(len(temperatures))
    boosting = Boosting(temperatures)
    for trained, served in zip(boosting.train()(heads), boosting.eval()(heads), strict=True):
        assert torch.equal(trained, served)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_a_loss_reaches_earlier_heads_only_if_configured(stop_gradient: bool) -> None:
    heads = head_logits(4, requires_grad=True)
    ensembled = Boosting([0.5] * 4, stop_gradient).train()(heads)
    gradients = torch.autograd.grad(ensembled[2].sum(), heads, allow_unused=True)
    assert gradients[3] is None
    assert torch.equal(gradients[2], torch.ones(4, 5))
    if stop_gradient:
        assert gradients[0] is None
        assert gradients[1] is None
    else:
        assert torch.equal(gradients[1], torch.full((4, 5), 0.5))
        assert torch.equal(gradients[0], torch.full((4, 5), 0.25))


@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=8))
def test_learned_temperatures_give_the_same_sums_as_fixed_ones(temperatures: list[float]) -> None:
    heads = head_logits(len(temperatures))
    boosting = Boosting(temperatures, learned=True)
    assert boosting.temperatures == pytest.approx(temperatures, abs=1e-5)
    fixed = boosting.fixed()
    assert not list(fixed.parameters())
    plain = Boosting(temperatures)(heads)
    for trained, served, expected in zip(boosting.train()(heads), fixed.eval()(heads), plain, strict=True):
        assert torch.equal(trained, served)
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-4)


def test_the_served_ensemble_keeps_scales_and_learned_temperatures() -> None:
    boosting, heads = Boosting([0.5] * 3, scales=[0.9, 0.7, 0.4], learned=True).eval(), head_logits(3)
    for served, trained in zip(boosting.fixed()(heads), boosting(heads), strict=True):
        assert torch.equal(served, trained)


def test_a_loss_trains_the_temperature_of_its_own_exit() -> None:
    """d loss_n / d t_n is the gradient of F_n along F_(n-1); earlier temperatures are detached."""
    heads = head_logits(4)
    boosting = Boosting([0.5, 0.3, 0.6, 0.8], learned=True).train()
    ensembled = boosting(heads)
    labels = torch.tensor([0, 1, 2, 3])
    loss = functional.cross_entropy(ensembled[2], labels)
    assert boosting.log_odds is not None
    (gradient,) = torch.autograd.grad(loss, boosting.log_odds)
    at_logits = (ensembled[2].softmax(1) - functional.one_hot(labels, 5)) / 4
    expected = (at_logits * ensembled[1]).sum() * 0.6 * 0.4  # t = sigmoid(log-odds)
    torch.testing.assert_close(gradient, torch.tensor([0.0, expected.item(), 0.0]))


def test_learned_temperatures_can_be_set_and_start_between_zero_and_one() -> None:
    boosting = Boosting([0.5] * 3, learned=True)
    boosting.temperatures = (0.5, 0.2, 0.9)
    assert boosting.temperatures == pytest.approx((0.5, 0.2, 0.9))
    for wrong in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Boosting([0.5, wrong], learned=True)
    assert Boosting([0.5], learned=True)(head_logits(1))[0].shape == (4, 5)  # one exit: nothing to learn


def test_zero_temperature_leaves_the_heads_unchanged() -> None:
    heads = head_logits(3)
    assert all(a is b for a, b in zip(Boosting([0.0] * 3)(heads), heads, strict=True))


def test_the_ensemble_of_half_precision_logits_is_float32() -> None:
    heads = [x.bfloat16() for x in head_logits(3)]
    for temperature in (0.5, 0.0):
        assert [x.dtype for x in Boosting([temperature] * 3)(heads)] == [torch.float32] * 3


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [(0.5, (0.5,) * 5), ([0.3], (0.3,) * 5), ([0.0, 1.0], (0, 0.25, 0.5, 0.75, 1)), ([1, 2, 3, 4, 5], (1, 2, 3, 4, 5))],
)
def test_temperatures_are_broadcast_interpolated_or_taken_as_given(
    given_values: object, expected: tuple[float, ...]
) -> None:
    assert temperatures_per_exit(given_values, 5) == pytest.approx(expected)  # type: ignore[arg-type]


def test_a_wrong_number_of_temperatures_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"3 temperatures for 5 exits: give 1, 2 \(linear\) or 5"):
        temperatures_per_exit([1, 2, 3], 5)
    with pytest.raises(ValueError, match="2 temperatures for 1 exits"):
        temperatures_per_exit([1, 2], 1)  # interpolation needs two values


@given(st.floats(0.01, 20, allow_nan=False))
def test_rescaling_is_the_identity_forward_and_a_factor_backward(factor: float) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = rescale_gradient(x, factor)
    assert torch.equal(x, y)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.full((3, 4), factor))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside torch.compile
def test_rescaling_survives_compilation() -> None:
    """A custom function once silently lost its factor under torch.compile (pytorch #102970)."""
    compiled = torch.compile(lambda x: rescale_gradient(x, 0.125) * 2, backend="aot_eager")
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(gradient, torch.full((3, 4), 0.25))


# --- on the published CIFAR anytime network --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 3, 32, 32, generator=generator), torch.randint(0, 100, (32,), generator=generator)


def c_any(rescaling: Rescaling) -> MSDNet:
    torch.manual_seed(0)
    return MSDNet(CONFIGS["C-any"], 0.5, rescaling).train()


def gradient_norms(parts: nn.ModuleList, loss: Tensor) -> list[float]:
    """Norm of the gradient of `loss` in the parameters of each part; 0 where there is none."""
    norms = []
    for part in parts:
        gradients = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True)
        norms.append(
            float(torch.stack([g.square().sum() for g in gradients if g is not None] or [torch.zeros(())]).sum().sqrt())
        )
    return norms


# Measured on the reference model at its initialisation, one loss at a time; 1/(N-i) (Eq. 7) once one scale is left.
PUBLISHED_RATIOS = {
    1: [0.100],
    5: [0.114, 0.121, 0.131, 0.146, 0.167],
    10: [0.148, 0.156, 0.163, 0.178, 0.194, 0.214, 0.255, 0.333, 0.500, 1.000],
}


def test_rescaling_of_c_any_matches_the_published_ratios(images_and_labels: tuple[Tensor, Tensor]) -> None:
    images, labels = images_and_labels
    with_rescaling, without = c_any("coarsest"), c_any("off")
    outputs, plain_outputs = with_rescaling(images), without(images)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain_outputs, strict=True)), "outputs must not change"
    for exit_number, expected in PUBLISHED_RATIOS.items():
        loss = functional.cross_entropy(outputs[exit_number - 1], labels)
        plain_loss = functional.cross_entropy(plain_outputs[exit_number - 1], labels)
        scaled = gradient_norms(with_rescaling.blocks, loss)
        plain = gradient_norms(without.blocks, plain_loss)
        ratios = [a / b for a, b in zip(scaled[:exit_number], plain[:exit_number], strict=True)]
        assert ratios == pytest.approx(expected, abs=0.01), f"loss {exit_number}"
        assert scaled[exit_number:] == [0.0] * (10 - exit_number), "a loss must not reach blocks behind its exit"
        heads, plain_heads = gradient_norms(with_rescaling.heads, loss), gradient_norms(without.heads, plain_loss)
        assert heads == pytest.approx(plain_heads, rel=1e-5), "heads keep gradient weight 1"
        assert [i for i, norm in enumerate(heads) if norm > 0] == [exit_number - 1], "F_(n-1) stops the gradient"


def test_rescaling_on_all_scales_gives_equation_7_exactly(images_and_labels: tuple[Tensor, Tensor]) -> None:
    images, labels = images_and_labels
    scaled, plain = c_any("all"), c_any("off")
    losses = [functional.cross_entropy(network(images)[9], labels) for network in (scaled, plain)]
    ratios = [
        a / b
        for a, b in zip(gradient_norms(scaled.blocks, losses[0]), gradient_norms(plain.blocks, losses[1]), strict=True)
    ]
    assert ratios == pytest.approx([1 / (10 - i) for i in range(10)], rel=1e-3)
