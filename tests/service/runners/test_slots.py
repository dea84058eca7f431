"""Slots on a device and the rows' values in them: none is lost, duplicated or swapped."""

import numpy as np
import pytest
import torch

from service.runners.base import RunnerError
from service.runners.slots import SCRATCH, Slots, SlotState, buckets_for, stretches
from service.runners.torch_cuda.memory import Values
from tests.service.slotted import all_free


def started(slots: Slots, n_rows: int) -> list[SlotState]:
    states = [slots.admit() for _ in range(n_rows)]
    slots.begin(states)
    begun(states)
    return states


def begun(states: list[SlotState]) -> None:
    for state in states:
        state.begun()


def test_of_a_million_regrouped_rows_none_is_lost_duplicated_or_swapped() -> None:
    """Rows start, continue in random batches, and leave at random; each finds its own values, once per stage."""
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
            ids, held = np.arange(n_started, n_started + size), np.array(started(slots, size), object)
            n_started += size
        else:
            order = rng.permutation(len(waiting[stage][0]))
            ids, held = (column[order[:size]] for column in waiting[stage])
            waiting[stage] = (waiting[stage][0][order[size:]], waiting[stage][1][order[size:]])
        indices = torch.tensor([state.slot for state in held] + [SCRATCH] * 3)
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


def test_too_few_slots_are_an_error_and_none_is_lost() -> None:
    slots = Slots(5)
    held = started(slots, 3)
    assert SCRATCH not in {state.slot for state in held}
    waiting = [slots.admit() for _ in range(3)]
    with pytest.raises(RunnerError, match="3 images start, but fewer of the 5 slots are free"):
        slots.begin(waiting)
    del held[0]
    slots.begin(waiting)
    assert len({state.slot for state in [*held, *waiting]}) == 5
    del held, waiting
    assert all_free(slots)
    assert slots.n_places_taken == 0


def test_consecutive_images_get_adjacent_places_in_whatever_order_earlier_ones_left() -> None:
    slots, rng = Slots(64), np.random.default_rng(1)
    waiting: list[list[SlotState]] = []
    started_by_now: list[SlotState] = []
    for _ in range(500):
        waiting.append([slots.admit() for _ in range(8)])
        places = [state.place for state in waiting[-1]]
        assert len(stretches(places)) <= 2
        assert [first + i for first, n_rows in stretches(places) for i in range(n_rows)] == places
        if len(waiting) > 3:  # batches end in any order
            batch = waiting.pop(int(rng.integers(len(waiting))))
            slots.begin(batch)
            begun(batch)
            started_by_now += batch
        del started_by_now[int(rng.integers(24)) :]
    assert slots.n_places_taken == 8 * len(waiting)
    assert stretches([5, 6, 9, 10, 11, 3]) == [(5, 2), (9, 3), (3, 1)]


def test_without_a_free_place_there_is_an_error() -> None:
    slots = Slots(4)
    held = [slots.admit() for _ in range(4)]
    with pytest.raises(RunnerError, match="all 4 picture places are taken"):
        slots.admit()
    left = held[2].place
    del held[2]
    assert slots.admit().place == left


def test_an_image_that_an_earlier_run_may_still_read_is_kept() -> None:
    slots = Slots(2)
    [state] = batch = [slots.admit()]
    slots.begin(batch)  # its batch hangs,
    slot, place = state.slot, state.place
    slots.begin(batch)  # and it is retried
    begun(batch)
    assert (state.slot, state.place, slots.n_places_taken) == (slot, place, 1)
    del state, batch
    assert slots.n_places_taken == 0
    assert all_free(slots)


@pytest.mark.parametrize(("max_rows", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (24, [1, 2, 4, 8, 16, 24])])
def test_buckets_are_powers_of_two_and_the_largest_batch(max_rows: int, expected: list[int]) -> None:
    assert buckets_for(max_rows) == expected
