"""Slots on a device, and the values that rows keep in them: none is lost, doubled or swapped."""

import numpy as np
import pytest
import torch

from service.runners.base import RunnerError
from service.runners.slots import SCRATCH, Slots, buckets_for
from service.runners.torch_cuda.memory import Values
from tests.service.slotted import all_free


def test_a_million_rows_are_regrouped_and_none_is_lost_doubled_or_swapped() -> None:
    """Rows start, go on in batches of any others, and leave at random; every one finds its own values, once a stage."""
    n_images, n_stages, n_slots = 1_000_000, 4, 20_000
    rng = np.random.default_rng(0)
    slots = Slots(n_slots)
    made_by = {f"made by {k}": torch.zeros((2, 1), dtype=torch.int64) for k in range(n_stages)}
    values = Values(made_by | {"map": torch.zeros((2, 2, 3, 1), dtype=torch.int32)}, n_slots)
    nobody = (np.zeros(0, np.int64), np.zeros(0, object))
    waiting = [nobody] * n_stages  # images and their slots, before every stage but the first
    passed = np.zeros((n_stages, n_images), np.int8)
    n_started = n_ended = 0
    while n_ended < n_images:
        room = min(slots.n_free, n_images - n_started)
        ready = [stage for stage in range(1, n_stages) if len(waiting[stage][0])] + [0] * (room > 0)
        stage, size = int(rng.choice(ready)), int(rng.integers(1, 8000))
        if stage == 0:
            size = min(size, room)
            ids, held = np.arange(n_started, n_started + size), np.array(slots.take(size), object)
            n_started += size
        else:
            order = rng.permutation(len(waiting[stage][0]))
            ids, held = (column[order[:size]] for column in waiting[stage])
            waiting[stage] = (waiting[stage][0][order[size:]], waiting[stage][1][order[size:]])
        indices = torch.tensor([slot.index for slot in held] + [SCRATCH] * 3)
        images = torch.from_numpy(np.append(ids, [-1] * 3))
        names = [*(f"made by {k}" for k in range(stage)), *(["map"] if stage else [])]
        for earlier, found in enumerate(values.gather(names, indices)):
            if found.ndim == 2:
                assert torch.equal(found[:-3, 0], images[:-3] * 10 + earlier)
            else:
                assert torch.equal(found[:-3, 1, 2, 0], images[:-3].int())
        making = {f"made by {stage}": images[:, None] * 10 + stage}
        if stage == 0:
            making["map"] = images.int()[:, None, None, None].expand(-1, 2, 3, 1)
        values.scatter(making, indices)
        passed[stage, ids] += 1
        stays = rng.random(len(ids)) < (0.6 if stage + 1 < n_stages else 0.0)
        n_ended += int((~stays).sum())
        if stage + 1 < n_stages:
            columns = zip(waiting[stage + 1], (ids[stays], held[stays]), strict=True)
            waiting[stage + 1] = tuple(np.concatenate(pair) for pair in columns)
        del held
    assert (passed[0] == 1).all()
    assert (passed <= 1).all()
    assert (np.diff(passed, axis=0) <= 0).all()
    del waiting
    assert all_free(slots)


def test_too_few_slots_are_told_and_none_is_lost() -> None:
    slots = Slots(5)
    held = slots.take(3)
    assert SCRATCH not in {slot.index for slot in held}
    with pytest.raises(RunnerError, match="3 images start, and fewer of the 5 slots"):
        slots.take(3)
    assert len({slot.index for slot in [*held, *slots.take(2)]}) == 5
    del held
    assert all_free(slots)


@pytest.mark.parametrize(("max_rows", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (24, [1, 2, 4, 8, 16, 24])])
def test_buckets_are_powers_of_two_and_the_largest_batch(max_rows: int, expected: list[int]) -> None:
    assert buckets_for(max_rows) == expected
