"""The cost charged for images that leave at different exits equals that of running the compacted survivors."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.cost import measure_cost
from models.registry import build_network
from models.staging import IMAGES, StagedNetwork, split

ARGUMENTS = {"config": "C-batch-4", "n_classes": 10, "n_blocks": 3, "n_channels": 4, "growth_rate": 4}
EXITS = torch.tensor([0, 2, 1, 0, 0, 1, 2, 2])  # the exit of each of eight images, from 0


def run_all_scales(network: nn.Module, _: StagedNetwork, images: Tensor) -> None:
    """Block by block as in the published code: all maps of a block, whether or not its exit reads them."""
    maps, here = network.stem(images), torch.arange(len(images))
    for number, (block, head) in enumerate(zip(network.blocks, network.heads, strict=True)):
        maps = block(maps)
        head(maps[-1])
        stays = EXITS[here] > number
        maps, here = [x[stays] for x in maps], here[stays]
    assert len(here) == 0


def run_stages(_: nn.Module, staged: StagedNetwork, images: Tensor) -> None:
    """Stage by stage as served: only what the exit needs."""
    state, here = {IMAGES: images}, torch.arange(len(images))
    for number, stage in enumerate(staged.stages):
        state |= zip(stage.outputs, stage(*(state[name] for name in stage.inputs)), strict=True)
        stays = EXITS[here] > number
        state, here = {name: value[stays] for name, value in state.items()}, here[stays]
    assert len(here) == 0


@pytest.mark.parametrize(("run", "kind"), [(run_all_scales, "published_macs"), (run_stages, "executed_macs")])
@torch.no_grad()
def test_shares_times_cost_equals_pytorchs_count_for_compacted_survivors(run, kind: str) -> None:
    network = build_network("msdnet", ARGUMENTS).eval()
    images = torch.randn(len(EXITS), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    costs = getattr(measure_cost(network, 32), kind)
    one_by_one = sum(costs[exit_index] for exit_index in EXITS.tolist())
    staged = split(network, images[:2])
    with FlopCounterMode(display=False) as counter:
        run(network, staged, images)
    assert counter.get_total_flops() // 2 == one_by_one
    assert one_by_one < len(EXITS) * costs[-1]
