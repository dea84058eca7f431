"""The scheduler's promises under a virtual clock: nothing lost, nothing twice, first in first out, nobody starves."""

import heapq
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduler import POLICIES, Scheduler, ripe_rows

N_STAGES = 4
POLICY = st.sampled_from(sorted(POLICIES))


@settings(max_examples=120, deadline=None)
@given(
    policy=POLICY,
    max_rows=st.integers(1, 6),
    max_wait_s=st.sampled_from([0.0, 1.5, 100.0]),
    ripe=st.lists(st.integers(1, 6), min_size=N_STAGES, max_size=N_STAGES),
    actions=st.lists(st.tuples(st.sampled_from(["arrive", "arrive", "pick", "drop"]), st.integers(0, 7)), max_size=150),
)
def test_nothing_is_lost_or_run_twice_and_every_queue_is_first_in_first_out(
    policy, max_rows, max_wait_s, ripe, actions
):
    scheduler: Scheduler[int] = Scheduler(N_STAGES, max_rows, max_wait_s, ripe, policy)
    queues: list[list[int]] = [[] for _ in range(N_STAGES)]  # what ought to be in each, in order
    dropped, finished, n_rows = set(), [], 0
    for now_s, (action, number) in enumerate([*actions, *[("pick", 5)] * 600]):
        if action == "arrive":
            rows = list(range(n_rows, n_rows + number))
            n_rows += number
            scheduler.add(rows, 0, now_s)
            queues[0] += rows
        elif action == "drop" and (waiting := [row for queue in queues for row in queue]):
            row = waiting[number % len(waiting)]
            assert scheduler.drop(row)
            assert not scheduler.drop(row)
            dropped.add(row)
            for queue in queues:
                if row in queue:
                    queue.remove(row)
        elif action == "pick":
            picked = scheduler.pick(now_s)
            if picked is None:
                assert not any(queues)  # never idle while a queue holds work
                continue
            stage, rows = picked
            assert 1 <= len(rows) <= max_rows
            assert rows == queues[stage][: len(rows)]
            if policy != "no-merge":
                assert len(rows) == min(max_rows, len(queues[stage]))
            del queues[stage][: len(rows)]
            going_on = [row for row in rows if (row + stage) % 8 < number and stage + 1 < N_STAGES]
            if going_on:
                scheduler.add(going_on, stage + 1, now_s)
                queues[stage + 1] += going_on
            finished += [row for row in rows if row not in going_on]
        assert [scheduler.queued_rows(stage) for stage in range(N_STAGES)] == [len(queue) for queue in queues]
        assert len(scheduler) == sum(len(queue) for queue in queues)
    assert Counter([*finished, *dropped]) == Counter(range(n_rows))


@settings(max_examples=30, deadline=None)
@given(
    policy=POLICY,
    max_rows=st.integers(1, 8),
    max_wait_s=st.sampled_from([0.0, 3.0, 20.0]),
    ripe=st.integers(1, 8),
    n_lanes=st.integers(1, 3),
    n_held=st.integers(1, 40),
    leaves_at=st.lists(st.integers(0, N_STAGES - 1), min_size=200, max_size=200),
)
def test_no_row_waits_longer_than_the_stated_bound_in_a_flood(
    policy, max_rows, max_wait_s, ripe, n_lanes, n_held, leaves_at
):
    """`n_held` rows are kept in the scheduler at any time: what leaves is replaced at once, at stage 0."""
    scheduler: Scheduler[int] = Scheduler(N_STAGES, max_rows, max_wait_s, (ripe,) * N_STAGES, policy)
    added_s: dict[int, float] = {}
    pick_number: dict[int, int] = {}  # when a row's time was up: how many batches had been picked
    running: list[tuple[float, int, int, list[int]]] = []
    now_s, n_arrived, n_picks, n_ended = 0.0, 0, 0, 0

    def arrive() -> None:
        nonlocal n_arrived
        scheduler.add([n_arrived], 0, now_s)
        added_s[n_arrived] = now_s
        n_arrived += 1

    for _ in range(n_held):
        arrive()
    while n_ended < 1_000:
        while len(running) < n_lanes and (picked := scheduler.pick(now_s)):
            stage, rows = picked
            n_picks += 1
            for row in rows:
                del added_s[row]
                assert n_picks - pick_number.pop(row, n_picks) <= n_held * N_STAGES
            heapq.heappush(running, (now_s + 1 + len(rows) % 3, n_picks, stage, rows))
        now_s, _, stage, rows = heapq.heappop(running)
        for row in rows:
            if stage == leaves_at[row % len(leaves_at)]:
                n_ended += 1
                arrive()
            else:
                scheduler.add([row], stage + 1, now_s)
                added_s[row] = now_s
        for row, since_s in added_s.items():
            if now_s - since_s >= max_wait_s:
                pick_number.setdefault(row, n_picks)


def test_a_lone_deep_row_is_not_forgotten_while_the_first_queue_is_always_full():
    scheduler: Scheduler[str] = Scheduler(2, max_rows=4, max_wait_s=10.0, ripe=(4, 4))
    scheduler.add(["deep"], 1, 0.0)
    for now_s in range(30):
        scheduler.add([f"{now_s}-{i}" for i in range(4)], 0, now_s)
        stage, rows = scheduler.pick(float(now_s)) or (-1, [])
        if rows == ["deep"]:
            assert (now_s, stage) == (10, 1)
            return
    pytest.fail("the deep row starved")


def test_ripe_queues_run_deepest_first_and_unripe_ones_wait_for_company():
    scheduler: Scheduler[str] = Scheduler(3, max_rows=4, max_wait_s=1e9, ripe=(2, 2, 2))
    scheduler.add(["c1"], 2, 0.0)
    scheduler.add(["b1", "b2", "b3", "b4", "b5"], 1, 0.0)
    scheduler.add(["a1", "a2", "a3"], 0, 0.0)
    assert scheduler.pick(0.0) == (1, ["b1", "b2", "b3", "b4"])
    assert scheduler.pick(0.0) == (0, ["a1", "a2", "a3"])
    scheduler.add(["c2"], 2, 0.0)
    assert scheduler.pick(0.0) == (2, ["c1", "c2"])
    assert scheduler.pick(0.0) == (1, ["b5"])  # work is never left lying
    assert scheduler.pick(0.0) is None


def test_rows_of_two_batches_merge_or_keep_apart_as_the_policy_says():
    for policy, expected in (("default", ["a", "b", "c"]), ("no-merge", ["a", "b"])):
        scheduler: Scheduler[str] = Scheduler(2, policy=policy)
        scheduler.add(["a", "b"], 1, 0.0)
        scheduler.add(["c"], 1, 0.0)
        assert scheduler.pick(0.0) == (1, expected)


def test_a_row_can_wait_in_one_place_only():
    scheduler: Scheduler[str] = Scheduler(2)
    scheduler.add(["a"], 0, 0.0)
    with pytest.raises(ValueError, match="already waits"):
        scheduler.add(["a"], 1, 0.0)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [({"policy": "fastest"}, "default, deepest, no-merge"), ({"max_rows": 0}, "at least"), ({"max_wait_s": -1}, "0")],
)
def test_bad_settings_are_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        Scheduler(2, **arguments)


def test_ripe_rows_keep_the_fixed_share_low():
    assert ripe_rows(fixed_s=0.6, per_row_s=1.0, max_rows=32, max_fixed_share=0.15) == 4
    assert ripe_rows(fixed_s=100.0, per_row_s=1.0, max_rows=64) == 8
    assert ripe_rows(fixed_s=100.0, per_row_s=1.0, max_rows=4) == 1
    assert ripe_rows(fixed_s=0.0, per_row_s=1.0, max_rows=32) == 1
