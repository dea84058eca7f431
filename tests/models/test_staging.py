"""Stages give the whole network's answers bit for bit, and compute and carry no more than necessary."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.cost import measure_cost
from models.msdnet import CONFIGS
from models.registry import build_network
from models.staging import IMAGES, StagedNetwork, split
from tests.models.networks import Chunks, InPlace, RandomNetwork, Shapes, TwoExits, randomise_statistics


@pytest.fixture(scope="module", params=["C-any", "C-batch-4", "I-5"])
def staged_msdnet(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor, StagedNetwork]:
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    network = randomise_statistics(build_network("msdnet", {"config": request.param}))
    images = torch.randn(2, 3, config.image_size_px, config.image_size_px)
    return request.param, network, images, split(network, images)


def assert_same_answers(network: nn.Module, images: Tensor) -> StagedNetwork:
    staged = split(network, images)
    example = images.clone()
    with torch.no_grad():
        parts = staged.run(images)
        assert torch.equal(images, example), "an image that waits stays as it came"
        for whole, part in zip(network.eval()(images), parts, strict=True):
            assert torch.equal(whole, part)
    return staged


def test_msdnet_stages_answer_bit_for_bit(staged_msdnet):
    _, network, images, staged = staged_msdnet
    with torch.no_grad():
        whole = network.eval()(images)
        assert len(staged.stages) == len(whole)
        for expected, logits in zip(whole, staged.run(images), strict=True):
            assert torch.equal(expected, logits)


def test_the_state_contains_only_what_later_stages_read(staged_msdnet):
    name, _, _, staged = staged_msdnet
    state_kib = sum(spec.bytes_per_row for spec in staged.state_after(1)) / 1024
    # Carrying all maps of the block would take 280, 280 and 2,487 KiB.
    assert state_kib == {"C-any": 220.390625, "C-batch-4": 220.390625, "I-5": 1657.65625}[name]
    for number, stage in enumerate(staged.stages, start=1):
        carried = {spec.name for spec in staged.state_after(number)}
        later = {read for other in staged.stages[number:] for read in other.inputs}
        assert carried <= later
        assert stage.outputs[0] == f"logits_{number}"
        assert set(stage.outputs[1:]) <= carried
    assert staged.state_after(len(staged.stages)) == ()


def test_boosted_logits_are_both_answer_and_state(staged_msdnet):
    _, _, _, staged = staged_msdnet
    for number, stage in enumerate(staged.stages[1:], start=2):
        assert f"logits_{number - 1}" in stage.inputs
        assert stage.outputs.count(f"logits_{number}") == 1


def test_state_shapes_match_execution(staged_msdnet):
    _, _, images, staged = staged_msdnet
    state = {IMAGES: images}
    with torch.no_grad():
        for stage in staged.stages:
            state.update(zip(stage.outputs, stage(*(state[name] for name in stage.inputs)), strict=True))
    for name, value in state.items():
        assert (tuple(value.shape[1:]), value.dtype) == (staged.values[name].shape, staged.values[name].dtype)


def test_stages_execute_exactly_the_charged_multiply_adds(staged_msdnet):
    """For every stage, PyTorch's counter gives the executed multiply-adds of `measure_cost`."""
    _, network, images, staged = staged_msdnet
    cost = measure_cost(network, images.shape[-1])
    state, run_macs = {IMAGES: images[:1]}, 0
    for executed_macs, stage in zip(cost.executed_macs, staged.stages, strict=True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = stage(*(state[name] for name in stage.inputs))
        state.update(zip(stage.outputs, outputs, strict=True))
        run_macs += counter.get_total_flops() // 2
        assert run_macs == executed_macs


def test_training_does_not_change_a_snapshot():
    network = TwoExits()
    images = torch.randn(2, 3, 8, 8)
    staged = split(network, images)
    before = [logits.clone() for logits in staged.run(images)]
    assert network.training, "split leaves the network's mode as it was"
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
        network.train()(images)
        for expected, logits in zip(before, staged.run(images), strict=True):
            assert torch.equal(expected, logits)


@pytest.mark.parametrize("network", [InPlace, Shapes, Chunks, TwoExits], ids=lambda kind: kind.__name__)
def test_awkward_networks_answer_bit_for_bit(network):
    torch.manual_seed(1)
    assert_same_answers(randomise_statistics(network()), torch.randn(3, 3, 8, 8))


def test_reading_a_size_does_not_compute_the_map():
    """The first exit of `Shapes` reads the size of the fine map; the map itself belongs to the second."""
    staged = split(Shapes(), torch.randn(2, 3, 8, 8))
    assert not any("fine" in str(node.target) for node in staged.stages[0].graph.nodes)
    assert all(isinstance(spec.shape, tuple) for spec in staged.state_after(1))


def test_only_tensors_pass_between_stages():
    staged = split(Chunks(), torch.randn(2, 3, 8, 8))
    assert [spec.shape for spec in staged.state_after(1)] == [(2, 8, 8), (5,)]


def test_images_are_state_if_a_later_exit_reads_them():
    staged = assert_same_answers(
        TwoExits(lambda x, images: torch.cat([x, images], 1), n_between=7), torch.randn(2, 3, 8, 8)
    )
    assert IMAGES in staged.stages[1].inputs
    assert IMAGES in {spec.name for spec in staged.state_after(1)}


def test_preprocess_is_part_of_stage_one():
    class Halve(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.permute(0, 3, 1, 2).float() / 255

    network, images = TwoExits(), torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    staged = split(network, images, Halve())
    assert staged.values[IMAGES].dtype == torch.uint8
    assert staged.values[IMAGES].shape == (8, 8, 3)
    with torch.no_grad():
        for whole, part in zip(network.eval()(Halve()(images)), staged.run(images), strict=True):
            assert torch.equal(whole, part)


@pytest.mark.parametrize("name", ["inputs", "outputs", "graph", "code", "preprocess", "images", "network"])
def test_submodules_may_have_any_name(name):
    """Even names that stages or torch.fx use themselves."""

    class Named(TwoExits):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, nn.ModuleList([self.head_1, self.head_2]))

        def forward(self, images: Tensor) -> list[Tensor]:
            head_1, head_2 = getattr(self, name)
            x = self.first(images)
            return [head_1(x), head_2(self.second(x))]

    assert_same_answers(randomise_statistics(Named()), torch.randn(2, 3, 8, 8))
    split(Named(), torch.randn(2, 3, 8, 8), nn.Identity())
    assert measure_cost(Named(), 8) == measure_cost(TwoExits(), 8)


def test_a_networks_class_may_be_pytorchs_own():
    """For example DataParallel: torch.fx does not trace into such classes."""

    class Wrapped(TwoExits):
        __module__ = nn.DataParallel.__module__

    assert len(assert_same_answers(randomise_statistics(Wrapped()), torch.randn(2, 3, 8, 8)).stages) == 2


def test_unneeded_code_is_removed():
    class Wasteful(TwoExits):
        def forward(self, images: Tensor) -> list[Tensor]:
            self.second(self.first(images)).relu()
            return super().forward(images)

    staged = split(Wasteful(), torch.randn(2, 3, 8, 8))
    convolutions = [n for s in staged.stages for n in s.graph.nodes if n.op == "call_module" and "0" in str(n.target)]
    assert len([n for n in convolutions if "head" not in str(n.target)]) == 2


def test_on_the_meta_device_nothing_is_computed():
    with torch.device("meta"):
        staged = split(build_network("msdnet", {"config": "C-lin-5"}), torch.empty(1, 3, 32, 32))
    assert len(staged.stages) == 5


OPERATIONS = ("conv", "conv", "add", "add in place", "relu in place", "halves")


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking is slow
@given(data=st.data())
def test_random_graphs_answer_bit_for_bit_and_cost_what_their_stages_run(data):
    operand = st.integers(0, 4)
    program = data.draw(st.lists(st.tuples(st.sampled_from(OPERATIONS), operand, operand), min_size=2, max_size=10))
    exits = sorted(data.draw(st.sets(st.integers(1, len(program)), min_size=1, max_size=3)))
    torch.manual_seed(2)
    network = randomise_statistics(RandomNetwork(program, exits))
    staged = assert_same_answers(network, torch.randn(2, 3, 6, 6))
    cost = measure_cost(network, 6)
    assert all(executed <= published for executed, published in zip(cost.executed, cost.published, strict=True))
    assert sorted(cost.executed) == list(cost.executed)
    for number in range(1, len(exits) + 1):
        assert all(spec.shape[0] in (3, 5, 1) for spec in staged.state_after(number))
