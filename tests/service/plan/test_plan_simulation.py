"""The simulation behind `python -m service plan`: it agrees with queueing theory where that has a solution."""

from itertools import pairwise

import numpy as np
import pytest

from models.frontier import build_frontier
from service.plan import planning
from service.plan.arrivals import poisson
from service.plan.planning import Planner, first, least_replicas, observe
from service.plan.simulation import Network, Record, Setup, Simulation
from service.plan.stage_times import StageTimes
from tests.service.simulation import COSTS_MFLOPS, FULL_MFLOPS, population

MS = 1e-3


def times(*stage_seconds: dict[int, float], **others: float) -> StageTimes:
    known = {"n_lanes": 1, "n_cores": 1, "lanes_take_cores": True, "alone_speed": 1.0}
    host = {"host_image_seconds": 0.0, "host_batch_seconds": 0.0}
    return StageTimes(
        network="none",
        machine="none: chosen by a test",
        stage_seconds=stage_seconds,
        copy_row_seconds=[0.0] * len(stage_seconds),
        **{**known, **host, **others},
    )


def one_exit() -> Network:
    scores, correct = np.zeros((100, 1)), np.ones((100, 1), np.bool_)
    return Network(scores, correct, (10.0,), build_frontier(scores, correct, (10.0,)))


@pytest.fixture(scope="module")
def network() -> Network:
    scores, correct = population(5_000, seed=0)
    return Network(scores, correct, COSTS_MFLOPS, build_frontier(scores, correct, COSTS_MFLOPS))


SIX_STAGES = times(*[{1: 1.0 * MS, 32: 8.0 * MS}] * 6, n_lanes=2, n_cores=2)


def waits_in_line(arrivals: list[float], service_s: float) -> list[float]:
    """One server, first come first served, constant service: Lindley's recursion."""
    waits = [0.0]
    for before, now in pairwise(arrivals):
        waits.append(max(0.0, waits[-1] + service_s - (now - before)))
    return waits


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_recursion_is_an_m_d_1_queue(load):
    """Pollaczek-Khinchine: the mean wait is load / (2 (1 - load)) services. What the next two compare with is right."""
    waits = waits_in_line(poisson(load / MS, 200_000, seed=1).tolist(), MS)
    assert np.mean(waits) == pytest.approx(load / (2 * (1 - load)) * MS, rel=0.05)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_image_at_a_time_waits_as_in_an_m_d_1_queue(load):
    arrivals = poisson(load / MS, 1_500, seed=1).tolist()
    record = Simulation(one_exit(), times({1: MS}), Setup(10.0, 1, 1, max_rows=1)).run(arrivals)
    waits = np.array(record.answered_s) - record.came_s - MS
    assert waits == pytest.approx(waits_in_line(arrivals, MS), abs=1e-9)


def test_the_host_is_a_queue_of_its_own():
    """Images that take 1 ms of the host and almost nothing of the device wait for the host."""
    arrivals = poisson(0.7 / MS, 1_500, seed=2).tolist()
    slow_host = times({1: 1e-9}, host_image_seconds=0.6 * MS, lanes_take_cores=False)
    record = Simulation(one_exit(), slow_host, Setup(10.0, 1, 1, max_rows=1, http_image_s=0.4 * MS)).run(arrivals)
    waits = np.array(record.answered_s) - record.came_s - MS
    assert waits == pytest.approx(waits_in_line(arrivals, MS), abs=1e-6)


@pytest.mark.parametrize(
    ("n_lanes", "n_cores", "lanes_take_cores", "host_ms", "per_s"),
    [
        (1, 1, True, 0.0, 1_000),
        (2, 2, True, 0.0, 2_000),
        (2, 1, True, 0.0, 1_000),  # two lanes share a core
        (8, 2, True, 0.0, 2_000),
        (1, 1, True, 0.25, 800),  # 1.25 ms per image on one core
        (1, 2, True, 0.25, 1_000),  # the host has a core to itself
        (1, 1, False, 0.25, 1_000),  # or the stages run on a device
    ],
)
def test_lanes_and_host_share_the_cores(n_lanes, n_cores, lanes_take_cores, host_ms, per_s):
    table = times({1: MS}, n_lanes=n_lanes, lanes_take_cores=lanes_take_cores, host_image_seconds=host_ms * MS)
    simulation = Simulation(one_exit(), table, Setup(10.0, n_lanes, n_cores, max_rows=1))
    record = simulation.saturate(300, n_in_flight=16)
    assert 300 / record.answered_s[-1] == pytest.approx(per_s, rel=0.02)


@pytest.mark.parametrize(
    ("n_cores", "lanes_take_cores", "answered_ms"),
    [
        (1, True, [15, 22]),  # 3 ms until it has the core, and then half of it; the end of the second leaves it free
        (2, True, [11, 21]),
        (1, False, [11, 21]),
    ],
)
def test_a_waking_host_waits_for_a_core_if_lanes_hold_them_all(n_cores, lanes_take_cores, answered_ms):
    """Two images, one after the other, 10 ms each; to take back a batch is 1 ms of the host's."""
    table = times({1: 10 * MS}, lanes_take_cores=lanes_take_cores, host_batch_seconds=1 * MS, wake_seconds=3 * MS)
    record = Simulation(one_exit(), table, Setup(10.0, 1, n_cores, max_rows=1)).run([0.0, 0.0])
    assert record.answered_s == pytest.approx([ms * MS for ms in answered_ms])


def test_a_waiting_host_gets_a_core_when_a_lane_is_idle():
    """Lanes are busy from 1 to 11 and from 2 to 12 ms; the third image comes at 6, and the host has a core at 11."""
    table = times({1: 10 * MS}, n_lanes=2, n_cores=2, host_image_seconds=1 * MS, wake_seconds=8 * MS)
    record = Simulation(one_exit(), table, Setup(10.0, 2, 2, max_rows=1)).run([0.0, 0.0, 6 * MS])
    assert record.answered_s == pytest.approx([11 * MS, 12 * MS, 22 * MS])


def test_the_hosts_wait_for_a_core_is_random():
    """Images in pairs: the second holds the core when the first one's batch is to be taken back."""
    table = times({1: 10 * MS}, host_batch_seconds=1e-9, wake_seconds=(0.0, 0.0, 0.0, 4 * MS))
    record = Simulation(one_exit(), table, Setup(10.0, 1, 1, max_rows=1)).run(np.repeat(np.arange(400.0), 2).tolist())
    took_s = np.array(record.answered_s)[::2] - record.came_s[::2]
    waited = took_s > 12 * MS
    assert took_s[waited] == pytest.approx(14 * MS, rel=1e-3)
    assert took_s[~waited] == pytest.approx(10 * MS, rel=1e-3)
    assert waited.mean() == pytest.approx(0.25, abs=0.08)


def test_batch_times_vary_by_the_measured_spread():
    table = times({1: 10 * MS}, spread=(1.0, 1.0, 1.0, 1.5))
    record = Simulation(one_exit(), table, Setup(10.0, 1, 1, max_rows=1)).run(np.arange(400.0).tolist())
    took_s = np.array(record.answered_s) - record.came_s
    slow = took_s > 12 * MS
    assert took_s[slow] == pytest.approx(15 * MS)
    assert took_s[~slow] == pytest.approx(10 * MS)
    assert slow.mean() == pytest.approx(0.25, abs=0.08)


def test_a_batch_alone_runs_at_the_measured_speed():
    table = times({1: 3 * MS}, n_lanes=2, n_cores=2, alone_speed=1.5)
    record = Simulation(one_exit(), table, Setup(10.0, 2, 2, max_rows=1)).run([0.0, 1.0, 1.0, 2.0])
    latencies = np.array(record.answered_s) - record.came_s
    assert latencies == pytest.approx([2 * MS, 3 * MS, 3 * MS, 2 * MS])


def test_two_batches_on_two_cores_do_not_count_as_alone():
    table = times({1: 3 * MS}, n_lanes=8, n_cores=2, alone_speed=1.5)
    record = Simulation(one_exit(), table, Setup(10.0, 8, 2, max_rows=1)).run([0.0, 1.0, 1.0])
    assert np.array(record.answered_s) - record.came_s == pytest.approx([2 * MS, 3 * MS, 3 * MS])


def test_throughput_of_full_batches_matches_the_stage_times():
    table = times({1: 1 * MS, 32: 8 * MS})
    record = Simulation(one_exit(), table, Setup(10.0, 1, 1)).saturate(3_200, n_in_flight=128)
    assert 3_200 / record.answered_s[-1] == pytest.approx(32 / (8 * MS), rel=0.02)
    assert record.batch_rows[0].count(32) >= 99  # the first and the last are smaller


def test_rows_of_several_blocks_cost_their_copies(network):
    """Nothing else differs between the two, so the difference is the time of copies."""
    setup = Setup(0.4 * FULL_MFLOPS, 2, 2)
    costly = SIX_STAGES.model_copy(update={"copy_row_seconds": (1 * MS,) * 6})
    plain, copying = (Simulation(network, table, setup).saturate(1_000, 256) for table in (SIX_STAGES, costly))
    assert copying.answered_s[-1] > 1.2 * plain.answered_s[-1]


@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_the_budget_is_kept_and_exit_shares_match_the_frontier(network, fraction):
    budget_mflops = fraction * FULL_MFLOPS
    planner = Planner(network, SIX_STAGES, Setup(budget_mflops, 2, 2))
    outcome = planner.at(2_000.0, 4_000)
    point = network.frontier.at_cost(budget_mflops)
    assert 0.985 * budget_mflops <= outcome.mean_mflops <= budget_mflops
    assert outcome.worst_mflops <= budget_mflops * 1.033  # 32 budgets in 1,000 answers, and the steering's aim
    assert outcome.shares == pytest.approx(point.shares, abs=0.04)
    assert outcome.accuracy == pytest.approx(point.accuracy, abs=0.015)
    assert outcome.images_per_s == pytest.approx(2_000, rel=0.05)
    assert outcome.p50_ms <= outcome.p95_ms <= outcome.p99_ms


def test_no_window_of_answers_overspends_by_more_than_the_burst(network):
    simulation = Simulation(network, SIX_STAGES, Setup(0.4 * FULL_MFLOPS, 2, 2, burst_images=32.0))
    record = simulation.run(poisson(2_000, 2_500, 3, burst_images=100).tolist())
    balance = np.cumsum(np.array(record.spent) - simulation.budget.budget)
    assert (balance - np.minimum.accumulate(np.minimum(balance, 0))).max() <= 32 * simulation.budget.budget


def test_the_same_seed_gives_the_same_run_and_another_a_different_one(network):
    setup = Setup(0.4 * FULL_MFLOPS, 2, 2)
    runs = [Simulation(network, SIX_STAGES, setup, seed).run(poisson(2_000, 600, seed).tolist()) for seed in (7, 7, 8)]
    assert runs[0] == runs[1]
    assert runs[0].answered_s != runs[2].answered_s


def test_every_image_is_answered_once_and_after_its_arrival(network):
    record = Simulation(network, SIX_STAGES, Setup(FULL_MFLOPS, 2, 2)).run(poisson(1_500, 1_000, 4, 7).tolist())
    assert sorted(record.came_s) == pytest.approx(poisson(1_500, 1_000, 4, 7).tolist())
    assert (np.array(record.answered_s) > record.came_s).all()
    assert (np.diff(record.answered_s) >= 0).all()


def test_arrivals_have_their_rate_and_their_bursts():
    alone, bursts = poisson(50.0, 20_000, 0), poisson(50.0, 20_000, 0, 10)
    for arrivals in (alone, bursts):
        assert len(arrivals) == 20_000
        assert 20_000 / arrivals[-1] == pytest.approx(50, rel=0.05)
    assert np.diff(alone).min() > 0
    assert len(set(bursts.tolist())) == 2_000


def test_the_number_of_replicas_is_the_least_for_the_latency(network, monkeypatch):
    for name in ("SETTLING_IMAGES", "SATURATED_IMAGES", "SEARCH_IMAGES"):
        monkeypatch.setattr(planning, name, 800)
    planner = Planner(network, SIX_STAGES, Setup(0.4 * FULL_MFLOPS, 2, 2))
    capacity = planner.saturated().images_per_s
    rate = 2.5 * capacity
    found = planner.replicas_for(rate, 30.0, capacity)
    assert found.needed is not None
    assert found.needed >= least_replicas(rate, capacity) == 3
    assert found.p99_ms == planner.at(rate / found.needed, 800).p99_ms <= 30.0
    impossible = planner.replicas_for(rate, 0.5, capacity)  # less than one stage takes
    assert impossible.needed is None
    assert impossible.p99_ms > 0.5


@pytest.mark.parametrize("answer", [4, 5, 6, 7, 11, 40])
def test_the_search_finds_the_first(answer):
    assert first(lambda n: n >= answer, 3, 40) == answer
    assert first(lambda n: False, 3, 40) is None


def test_an_outcome_describes_the_answers_after_settling():
    """Two that settled, 500 at the first exit and 1,000 at the last, a tenth of them cut short; one every 10 ms."""
    scores, correct = np.zeros((2, 2)), np.array([[True, False], [False, True]])
    network = Network(scores, correct, (10.0, 30.0), build_frontier(scores, correct, (10.0, 30.0)))
    exits = [1, 1] + [1] * 500 + [2] * 1_000
    record = Record(
        row=[1, 1] + [0] * 500 + [1] * 900 + [0] * 100,
        came_s=[0.01 * i for i in range(1_502)],
        answered_s=[0.01 * i + (0.5 if i < 2 else 0.002 if i < 1_480 else 0.009) for i in range(1_502)],
        exit=exits,
        reason=["budget"] * 2 + ["budget"] * 150 + ["confident"] * 350 + ["final"] * 1_000,
        spent=[10_000_000 if number == 1 else 30_000_000 for number in exits],
        batch_rows=[[1, 3], []],
    )
    outcome = observe(network, record, n_settling=2)
    assert outcome.images == 1_500
    assert outcome.images_per_s == pytest.approx(1_500 / (15.019 - 0.51))
    assert (outcome.p50_ms, outcome.p95_ms, outcome.p99_ms) == pytest.approx((2.0, 2.0, 9.0))
    assert outcome.batch_rows == (2.0, 0.0)
    assert outcome.mean_mflops == pytest.approx(70 / 3)
    assert outcome.worst_mflops == 30.0
    assert outcome.shares == pytest.approx((1 / 3, 2 / 3))
    assert outcome.cut_short == pytest.approx(0.1)
    assert outcome.accuracy == pytest.approx(1_400 / 1_500)


def test_the_settling_phase_is_not_counted():
    record = Simulation(one_exit(), times({1: MS}), Setup(10.0, 1, 1, max_rows=1)).run([0.0, 0.0, 0.0, 5.0])
    outcome = observe(one_exit(), record, n_settling=3)
    assert outcome.images == 1
    assert outcome.p50_ms == pytest.approx(1.0)
