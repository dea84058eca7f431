"""The scheduler's guarantees under a virtual clock: no row lost or run twice, first in first out, no starvation."""

import heapq
from collections import Counter
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.costs import CostTable
from service.engine.policies import POLICIES
from service.engine.scheduler import Scheduler

N_STAGES = 4


def table(fixed_s: float, row_s: float, copy_s: float = 0.0, n_stages: int = N_STAGES) -> CostTable:
    """A cost table with equal stages; copy costs are known unless they are 0."""
    costs = CostTable([{1: fixed_s + row_s, 32: fixed_s + 32 * row_s}] * n_stages)
    for stage in range(n_stages if copy_s else 0):
        costs.ran(stage, 32, fixed_s + 32 * (row_s + copy_s), copy_seconds=32 * copy_s)
    return costs


POLICY = st.sampled_from(sorted(POLICIES))
COSTS = st.builds(table, st.floats(0, 5), st.floats(0, 1), st.sampled_from([0.0, 0.1, 3.0]))


@settings(max_examples=120, deadline=None)
@given(
    policy=POLICY,
    max_rows=st.integers(1, 6),
    max_wait_s=st.sampled_from([0.0, 1.5, 100.0]),
    costs=COSTS,
    deadlines=st.booleans(),
    actions=st.lists(st.tuples(st.sampled_from(["arrive", "arrive", "pick", "drop"]), st.integers(0, 7)), max_size=150),
)
def test_nothing_is_lost_or_run_twice_and_every_queue_is_first_in_first_out(
    policy, max_rows, max_wait_s, costs, deadlines, actions
):
    scheduler: Scheduler[int] = Scheduler(N_STAGES, max_rows, max_wait_s, costs, policy)
    queues: list[list[int]] = [[] for _ in range(N_STAGES)]  # the expected content of each, in order
    dropped, finished, n_rows = set(), [], 0
    for now_s, (action, number) in enumerate([*actions, *[("pick", 5)] * 600]):
        if action == "arrive":
            rows = list(range(n_rows, n_rows + number))
            n_rows += number
            scheduler.add(
                rows, 0, now_s, due_s=[now_s + row % 9 if row % 3 else inf for row in rows] if deadlines else None
            )
            queues[0] += rows
        elif action == "drop" and (waiting := [row for queue in queues for row in queue]):
            row = waiting[number % len(waiting)]
            assert scheduler.drop(row) == next(stage for stage, queue in enumerate(queues) if row in queue)
            assert scheduler.drop(row) is None
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
            if stage == 0 or policy == "merge-full":
                assert len(rows) == min(max_rows, len(queues[stage]))
            del queues[stage][: len(rows)]
            going_on = [row for row in rows if (row + stage) % 8 < number and stage + 1 < N_STAGES]
            if going_on:
                scheduler.add(going_on, stage + 1, now_s, joined=number % 2 == 0)
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
    costs=COSTS,
    deadlines=st.booleans(),
    n_lanes=st.integers(1, 3),
    n_held=st.integers(1, 40),
    leaves_at=st.lists(st.integers(0, N_STAGES - 1), min_size=200, max_size=200),
)
def test_in_a_flood_no_row_waits_longer_than_the_documented_bound(
    policy, max_rows, max_wait_s, costs, deadlines, n_lanes, n_held, leaves_at
):
    """The scheduler always holds `n_held` rows: those that leave are replaced at once, at stage 0."""
    scheduler: Scheduler[int] = Scheduler(N_STAGES, max_rows, max_wait_s, costs, policy)
    bound = n_held * N_STAGES * (2 if deadlines else 1)
    added_s: dict[int, float] = {}
    pick_number: dict[int, int] = {}  # the number of batches picked when a row's maximum wait ended
    running: list[tuple[float, int, int, list[int]]] = []
    now_s, n_arrived, n_picks, n_ended = 0.0, 0, 0, 0

    def arrive() -> None:
        nonlocal n_arrived
        scheduler.add([n_arrived], 0, now_s, due_s=[now_s + 2 if n_arrived % 2 else inf] if deadlines else None)
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
                assert n_picks - pick_number.pop(row, n_picks) <= bound
            heapq.heappush(running, (now_s + 1 + len(rows) % 3, n_picks, stage, rows))
        now_s, _, stage, rows = heapq.heappop(running)
        for row in rows:
            if stage == leaves_at[row % len(leaves_at)]:
                n_ended += 1
                arrive()
            else:
                scheduler.add([row], stage + 1, now_s, due_s=[now_s + 2 if row % 2 else inf] if deadlines else None)
                added_s[row] = now_s
        for row, since_s in added_s.items():
            if now_s - since_s >= max_wait_s:
                pick_number.setdefault(row, n_picks)


def test_a_single_deep_row_runs_although_the_first_queue_is_always_full():
    scheduler: Scheduler[str] = Scheduler(2, max_rows=4, max_wait_s=10.0, costs=table(fixed_s=9, row_s=0.1, n_stages=2))
    scheduler.add(["deep"], 1, 0.0)
    for now_s in range(30):
        scheduler.add([f"{now_s}-{i}" for i in range(4)], 0, now_s)
        stage, rows = scheduler.pick(float(now_s)) or (-1, [])
        if rows == ["deep"]:
            assert (now_s, stage) == (10, 1)
            return
    pytest.fail("the deep row starved")


def test_the_deepest_worthwhile_queue_runs_first_and_others_wait_to_fill():
    # A batch of the longest queue takes 1 + 4 x 1 = 5 s, and 9 rows wait: two rows waste 10 s to save 9, one row 5 s.
    scheduler: Scheduler[str] = Scheduler(3, max_rows=4, max_wait_s=1e9, costs=table(1, 1, n_stages=3))
    scheduler.add(["c1"], 2, 0.0)
    scheduler.add(["b1", "b2", "b3", "b4", "b5"], 1, 0.0)
    scheduler.add(["a1", "a2", "a3"], 0, 0.0)
    assert scheduler.pick(0.0) == (1, ["b1", "b2", "b3", "b4"])
    scheduler.add(["a4", "a5", "a6", "a7"], 0, 0.0)
    assert scheduler.pick(0.0) == (0, ["a1", "a2", "a3", "a4"])
    scheduler.add(["c2"], 2, 0.0)
    assert scheduler.pick(0.0) == (2, ["c1", "c2"])
    scheduler.drop("a7")
    scheduler.drop("a6")
    assert scheduler.pick(0.0) == (1, ["b5"])  # three rows are waiting, and none is worth more than a batch of 2
    assert scheduler.pick(0.0) == (0, ["a5"])
    assert scheduler.pick(0.0) is None  # and the lanes never idled while rows waited


def test_with_negligible_fixed_cost_no_queue_waits():
    scheduler: Scheduler[str] = Scheduler(2, max_rows=4, max_wait_s=1e9, costs=table(0, 1, n_stages=2))
    scheduler.add(["b"], 1, 0.0)
    scheduler.add(["a1", "a2", "a3", "a4"], 0, 0.0)
    assert scheduler.pick(0.0) == (1, ["b"])


PAIRS = (["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    ("policy", "costs", "joined", "expected"),
    [
        ("default", table(fixed_s=1.0, row_s=1.0, copy_s=0.2), True, 4),  # 4 copies, 0.8, save 1
        ("default", table(fixed_s=1.0, row_s=1.0, copy_s=0.3), True, 2),  # 4 copies, 1.2
        ("default", table(fixed_s=1.0, row_s=1.0, copy_s=9.9), False, 4),  # copied in any case
        ("none", table(fixed_s=9.0, row_s=1.0), True, 2),
        ("no-compaction", table(fixed_s=1.0, row_s=1.0, copy_s=0.2), True, 4),
        ("always-compact", table(fixed_s=9.0, row_s=1.0), False, 2),
        ("merge-full", table(fixed_s=0.0, row_s=1.0, copy_s=9.9), True, 4),
    ],
)
def test_batches_merge_if_that_saves_more_than_copying_or_by_policy(policy, costs, joined, expected):
    scheduler: Scheduler[str] = Scheduler(N_STAGES, costs=costs, policy=policy)
    for rows in PAIRS:
        scheduler.add(rows, 1, 0.0, joined=joined)
    assert scheduler.pick(0.0) == (1, [*PAIRS[0], *PAIRS[1]][:expected])


def test_a_group_is_split_to_fill_a_batch_only_if_no_copy_is_needed():
    for joined, expected in ((False, 8), (True, 5)):
        scheduler: Scheduler[int] = Scheduler(2, max_rows=8, costs=table(1.0, 1.0, 0.15, n_stages=2))
        scheduler.add(range(5), 1, 0.0, joined=joined)
        scheduler.add(range(5, 11), 1, 0.0, joined=joined)  # half a batch is saved, for eight copies, 1.2
        assert scheduler.pick(0.0) == (1, list(range(expected)))


def test_queues_wait_for_full_batches_up_to_the_maximum_wait():
    scheduler: Scheduler[int] = Scheduler(2, max_rows=4, max_wait_s=5.0, policy="merge-full")
    scheduler.add(range(3), 1, 0.0)
    for now_s in (1.0, 4.0, 6.0):
        scheduler.add(range(int(100 * now_s), int(100 * now_s) + 4), 0, now_s)
    assert scheduler.pick(4.0) == (0, [100, 101, 102, 103])
    assert scheduler.pick(6.0) == (1, [0, 1, 2])


def test_a_row_whose_deadline_is_near_runs_before_deeper_ones_but_not_twice_in_a_row():
    def pick(due_s: float) -> int:
        scheduler: Scheduler[str] = Scheduler(3, max_rows=4, costs=table(1, 1, n_stages=3))  # a batch of one takes 2 s
        scheduler.add(["deep"], 2, 0.0)
        scheduler.add(["plain", "hurried"], 1, 0.0, due_s=[inf, due_s])  # 3 s
        picked = scheduler.pick(0.0)
        assert picked
        return picked[0]

    assert pick(due_s=7.0) == 2  # there is time for both
    assert pick(due_s=5.9) == 1
    assert pick(due_s=3.0) == 1
    assert pick(due_s=2.9) == 2  # too late: it is answered by the exit that it has passed

    scheduler: Scheduler[int] = Scheduler(2, max_rows=1, costs=table(1, 1, n_stages=2))
    scheduler.add(range(3), 0, 0.0, due_s=[1.0] * 3)
    scheduler.add(range(10, 13), 1, 0.0)
    assert [scheduler.pick(0.0) for _ in range(6)] == [(0, [0]), (1, [10]), (0, [1]), (1, [11]), (0, [2]), (1, [12])]


def test_all_waiting_rows_can_be_removed_with_their_stages():
    scheduler: Scheduler[str] = Scheduler(3, max_rows=2)
    scheduler.add(["a1", "a2", "a3"], 0, 0.0)
    scheduler.add(["c1", "c2"], 2, 0.0, due_s=[1.0, inf])
    scheduler.drop("c1")
    assert scheduler.pick(0.0) == (2, ["c2"])
    scheduler.add(["b"], 1, 0.0)
    assert scheduler.drop_all() == [(0, "a1"), (0, "a2"), (0, "a3"), (1, "b")]
    assert (len(scheduler), scheduler.pick(0.0), scheduler.drop_all()) == (0, None, [])


def test_batches_can_be_made_smaller():
    scheduler: Scheduler[int] = Scheduler(2, max_rows=8)
    scheduler.limits.limit(3)
    scheduler.add(range(8), 0, 0.0)
    assert scheduler.max_rows == 3
    assert [scheduler.pick(0.0) for _ in range(3)] == [(0, [0, 1, 2]), (0, [3, 4, 5]), (0, [6, 7])]


def test_it_knows_whether_any_queued_row_has_a_deadline():
    scheduler: Scheduler[int] = Scheduler(3, max_rows=2, costs=table(1, 1, n_stages=3))

    def hurries() -> bool:
        scheduler.add([99], 2, 0.0)
        picked = scheduler.pick(0.0)
        assert picked
        if picked[0] == 1:
            scheduler.pick(0.0)
        return picked[0] == 1

    scheduler.add(range(6), 1, 0.0, due_s=[inf, 3.0, 3.0, inf, 3.0, inf])  # a batch of two takes 3 s
    assert scheduler.drop(2) == 1
    assert scheduler.drop(0) == 1
    assert hurries()  # takes 1 and 3
    assert scheduler._queues[1].n_due == 1
    assert scheduler.drop(4) == 1
    assert not hurries()
    assert scheduler._queues[1].n_due == 0


class Compared(float):
    """A deadline that counts comparisons."""

    n = 0

    def __lt__(self, other: float) -> bool:
        Compared.n += 1
        return float(self) < other


def test_dropping_rows_with_deadlines_does_not_scan_the_queue():
    n_rows = 500
    scheduler: Scheduler[int] = Scheduler(2)
    scheduler.add(range(n_rows), 0, 0.0, due_s=[Compared(1.0)] * n_rows)
    for row in range(n_rows):
        assert scheduler.drop(row) == 0
    assert Compared.n <= 2 * n_rows
    assert (len(scheduler), scheduler._queues[0].n_due) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"policy": "fastest"}, "default, none, no-compaction, always-compact, merge-full"),
        ({"max_rows": 0}, "at least"),
        ({"max_wait_s": -1}, "0"),
    ],
)
def test_invalid_settings_are_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        Scheduler(2, **arguments)
