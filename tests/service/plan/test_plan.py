"""`python -m service plan` from the command line: the bundle that ships, stage times from a file or measured here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import null_bundle
from models.bundle import load_bundle
from service.__main__ import main
from service.plan import command, host_times, measuring, neighbours, planning, plot
from service.plan.measuring import measure
from service.plan.stage_times import StageTimes, StageTimesError
from tests.bundles import tiny_bundle
from tests.data import REPOSITORY

SHIPPED = REPOSITORY / "models" / "zoo" / "cifar100-msdnet"


@pytest.fixture(scope="module")
def shipped_times(tmp_path_factory) -> Path:
    """Chosen, not measured: two lanes, 1 ms plus 0.22 ms per row in every stage."""
    path = tmp_path_factory.mktemp("plan") / "times.json"
    StageTimes(
        network="cifar100-msdnet",
        machine="none: chosen by a test",
        n_lanes=2,
        n_cores=2,
        lanes_take_cores=True,
        alone_speed=1.2,
        stage_seconds=[{1: 0.001, 32: 0.008}] * 6,
        copy_row_seconds=[0.00001] * 6,
        host_image_seconds=0.00005,
        host_batch_seconds=0.0001,
    ).save(path)
    return path


@pytest.fixture
def short_runs(monkeypatch) -> None:
    """For tests that do not examine the numbers."""
    for name in ("SETTLING_IMAGES", "SATURATED_IMAGES", "SEARCH_IMAGES"):
        monkeypatch.setattr(planning, name, 400)
    monkeypatch.setattr(host_times, "HOST_S", 0.1)
    monkeypatch.setattr(command, "IMAGES", 1_000)


def plan(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["plan", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def planned(capsys, shipped_times: Path, *arguments: str) -> tuple[int, dict]:
    code, out, _ = plan(capsys, "--model", SHIPPED, "--stage-times", shipped_times, "--json", *arguments)
    return code, json.loads(out)


def test_the_network_that_ships_gets_a_sane_plan(capsys, shipped_times):
    code, found = planned(
        capsys, shipped_times, "--rate", "6000", "--replicas", "3", "--budget", "40%", "--seconds", "1"
    )
    assert code == 0
    bundle = load_bundle(SHIPPED)
    budget_mflops = 0.4 * bundle.costs_mflops[-1]
    point = bundle.frontier().at_cost(budget_mflops)
    top, outcome = found["saturated_replica"], found["replica_at_rate"]
    reaching = [1.0 - sum(top["shares"][:k]) for k in range(6)]
    ideal_per_s = 2 / sum(share * 0.008 / 32 for share in reaching)  # all batches full, and no host time
    assert 0.6 * ideal_per_s < top["images_per_s"] < ideal_per_s
    assert found["load"] == pytest.approx(2_000 / top["images_per_s"])
    assert outcome["images"] == 2_000
    assert outcome["images_per_s"] == pytest.approx(2_000, rel=0.1)
    assert 1.0 < outcome["p50_ms"] <= outcome["p95_ms"] <= outcome["p99_ms"] < 200
    assert outcome["mean_mflops"] == pytest.approx(budget_mflops, rel=0.02)
    assert outcome["accuracy"] == pytest.approx(point.accuracy, abs=0.03)
    assert outcome["shares"] == pytest.approx(point.shares, abs=0.04)
    assert found["least_replicas"] == -(-6_000 // top["images_per_s"])
    assert not found["overloaded"]


def test_int8_stages_have_their_own_scores(capsys, shipped_times, short_runs):
    asked = ["--rate", "2000", "--budget", "40%", "--seconds", "1", "--host-us", "110"]
    found = [planned(capsys, shipped_times, *asked, "--precision", name)[1] for name in ("fp32", "int8")]
    assert [plan["network"].split()[-1] for plan in found] == ["fp32", "int8"]
    assert [plan["setup"]["http_image_s"] for plan in found] == [pytest.approx(110e-6)] * 2
    assert found[0]["replica_at_rate"]["accuracy"] != found[1]["replica_at_rate"]["accuracy"]


def test_overload_is_reported_without_a_latency(capsys, shipped_times, short_runs):
    asked = ["--model", SHIPPED, "--stage-times", shipped_times, "--rate", "9000", "--budget", "24"]
    code, out, _ = plan(capsys, *asked, "--p99-ms", "40.125")
    assert code == 1
    assert "OVERLOAD: every replica's queue grows by" in out
    assert "p50" not in out
    assert "replicas for p99 <= 40.125 ms " in out  # the number after it apart


def test_it_measures_missing_times_and_reads_its_own_file(tmp_path, capsys, short_runs):
    tiny, saved = tiny_bundle(tmp_path / "tiny"), tmp_path / "here.json"
    asked = ["--model", tiny, "--rate", "20", "--budget", "70%", "--lanes", "2", "--max-batch-rows", "4"]
    code, out, err = plan(capsys, *asked, "--save-stage-times", saved)
    assert code == 0, err
    assert "measuring 4 stages on 2 lanes" in err
    assert "latency" in out
    assert "tiny-random" in out
    times = StageTimes.load(saved)
    assert [sorted(by_rows) for by_rows in times.stage_seconds] == [[1, 2, 4]] * 4
    assert times.n_lanes == 2
    assert times.host_batch_seconds > 0
    assert 0 < times.wake_seconds[0] <= times.wake_seconds[-1] < 60
    again = [plan(capsys, *asked, "--stage-times", saved, "--seed", "3") for _ in range(2)]
    assert again[0][:2] == again[1][:2]
    assert again[0][0] == 0
    assert "measuring" not in again[0][2]


def test_without_shared_batches_all_host_time_counts_per_image(tmp_path, monkeypatch, short_runs):
    """Also with one exit: then every image is one batch, so the work of both cannot be separated."""
    monkeypatch.setattr(null_bundle, "EXITS", null_bundle.EXITS[:1])
    times = measure(null_bundle.write_null_bundle(tmp_path / "null"), 1, max_rows=1, limit_s=0.1)
    assert times.host_batch_seconds == 0.0
    assert times.host_image_seconds > 0.0


def test_no_more_lanes_than_cores_are_measured_together(tmp_path, monkeypatch, short_runs):
    """Their waiting once counted twice, as the simulation also includes it: 8 lanes on 2 cores were planned a quarter
    of what 2 do."""
    monkeypatch.setattr(measuring, "default_lanes", lambda: 1)
    said: list[str] = []
    times = measure(null_bundle.write_null_bundle(tmp_path / "null"), 4, max_rows=2, limit_s=0.1, tell=said.append)
    assert (times.n_lanes, times.n_cores) == (4, 1)
    assert said[0].endswith("on 1 lanes")


def test_times_are_interpolated(shipped_times):
    times = StageTimes.load(shipped_times)
    assert times.seconds(0, 1) == pytest.approx(0.001)
    assert times.seconds(0, 32) == pytest.approx(0.008)
    assert times.seconds(0, 16) == pytest.approx(0.001 + 15 / 31 * 0.007)
    assert times.seconds(0, 63) == pytest.approx(0.015)
    only_one = StageTimes(**{**times.model_dump(), "stage_seconds": [{8: 0.004}] * 6})
    assert [only_one.seconds(0, n) for n in (1, 8, 16)] == pytest.approx([0.004, 0.004, 0.008])


def test_times_are_made_monotone_in_rows(shipped_times):
    measured_s = {1: 0.001, 8: 0.009, 16: 0.008}
    times = StageTimes(**{**StageTimes.load(shipped_times).model_dump(), "stage_seconds": [measured_s] * 6})
    assert [times.seconds(0, n) for n in (8, 12, 16)] == pytest.approx([0.009, 0.009, 0.009])
    assert times.seconds(0, 31) == pytest.approx(0.017)  # not as long as 16 rows, whatever the last two say


def test_a_plot_is_drawn(tmp_path, capsys, shipped_times, monkeypatch, short_runs):
    monkeypatch.setattr(plot, "LOADS", (0.4, 0.8))
    picture = tmp_path / "plan.png"
    asked = ["--model", SHIPPED, "--stage-times", shipped_times, "--rate", "2000", "--budget", "40%", "--seconds", "1"]
    code, _, err = plan(capsys, *asked, "--plot", picture)
    assert code == 0, err
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, err = plan(capsys, *asked, "--plot", tmp_path / "plan.png" / "below.png")
    assert (code, out) == (2, "")
    assert "there is no folder" in err


def test_times_measured_under_other_load_have_a_warning(capsys, shipped_times, tmp_path, monkeypatch, short_runs):
    monkeypatch.setattr(command, "measure", lambda *_, **__: StageTimes.load(shipped_times))
    saved = tmp_path / "here.json"
    for seconds_of_others, told in ((1e6, "beside other work that used 100% of the cores"), (0.0, "")):
        worked = iter([0.0, seconds_of_others])
        monkeypatch.setattr(neighbours, "_busy_s", lambda worked=worked: next(worked))
        _, out, err = plan(capsys, "--model", SHIPPED, "--rate", "10", "--save-stage-times", saved)
        for text in (out, err, StageTimes.load(saved).machine):
            assert "other work" not in text if not told else told in text


@pytest.mark.skipif(not neighbours.STAT.exists(), reason="Linux tells what cores do")
def test_the_cpu_share_of_other_processes_is_measured():
    spinning = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(spinning, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        began = Path(f"/proc/{other.pid}/stat").read_text().split()
        with neighbours.Neighbours() as seen:
            time.sleep(0.5)
            worked = Path(f"/proc/{other.pid}/stat").read_text().split()
        other.kill()
    its_own_s = (int(worked[13]) - int(began[13])) / os.sysconf("SC_CLK_TCK")
    assert seen.share is not None
    # It is one of the other processes; their CPU time has a resolution of 10 ms.
    assert 1.0 >= seen.share >= 0.5 * (its_own_s - 0.05) / (os.cpu_count() or 1)
    with neighbours.Neighbours() as seen:
        sum(range(3_000_000))  # this process's own work does not count
    assert seen.share is not None


def test_an_unwritable_file_is_refused_before_measuring(capsys):
    code, out, err = plan(capsys, "--model", str(SHIPPED), "--rate", "10", "--save-stage-times", "nowhere/here.json")
    assert (code, out) == (2, "")
    assert err == "error: --save-stage-times nowhere/here.json: there is no folder nowhere\n"


def test_a_plot_without_matplotlib_is_refused_at_once(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = plan(capsys, "--rate", "10", "--plot", "plan.png")
    assert code == 2
    assert "-m pip install matplotlib" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--budget", "1%"], "fraction 0.01 is below what the first exit costs"),
        (["--budget", "0.4"], "average_mflops 0.4 is below what the first exit costs"),
        (["--budget", "61M"], "average_mflops 61 is above what the last exit costs"),
        (["--budget", "cheap"], "--budget cheap: give a share of the full network, such as 40%"),
        (["--budget", ""], "--budget : give a share"),
        (["--accuracy", "0.99"], "accuracy 0.99 is more than this network reached"),
        (["--model", "resnet"], "--model resnet: neither a folder nor a network of models/zoo"),
        (["--model", str(REPOSITORY / "docs")], "manifest.json: missing: not a bundle"),
        (["--seconds", "1e9"], "simulate 1,000 to 2,000,000"),
        (["--seconds", "1e308"], "simulate 1,000 to 2,000,000"),
        (["--seconds", "0.1"], "simulate 1,000 to 2,000,000"),
        (["--stage-times", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--save-stage-times", "x.json"], "give one of them"),
        (["--plot", "plan.nonsense"], "--plot plan.nonsense: the file name must end in .png, .svg or .pdf"),
        (["--plot", "nowhere/plan.png"], "--plot nowhere/plan.png: there is no folder nowhere"),
    ],
)
def test_requests_that_cannot_be_planned_are_refused_with_the_reason(capsys, shipped_times, arguments, told):
    given = ["--model", str(SHIPPED)] if "--model" not in arguments else []
    given += ["--stage-times", str(shipped_times)] if "--stage-times" not in arguments else []
    code, out, err = plan(capsys, "--rate", "100", *given, *arguments)
    assert code == 2
    assert told in err
    assert not out
    assert "simulating" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rate", "many"], "'many' is not a number"),
        (["--rate", "0"], "0 is not a number above 0"),
        (["--rate", "nan"], "nan is not a number above 0"),
        (["--rate", "9", "--replicas", "1.5"], "1.5 is not a whole number from 1"),
        (["--rate", "9", "--host-us", "-1"], "-1 is not a number of at least 0"),
        (["--rate", "9", "--seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["--rate", "9", "--lanes", "1000"], "1000 is not a whole number from 1 to 256"),
        (["--rate", "9", "--max-batch-rows", "5000"], "5000 is not a whole number from 1 to 4,096"),
        (["--rate", "9", "--bursts", "5000"], "5000 is not a whole number from 1 to 1,024"),
        (["--rate", "9", "--policy", "wild"], "invalid choice"),
        (["--replicas", "2"], "--rate"),
    ],
)
def test_invalid_numbers_are_refused(capsys, arguments, told):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stage_seconds": [{"1": 0.001}]}, "copy_row_seconds must have one number per stage"),
        ({"stage_seconds": [{}] * 6}, "every stage needs the time of at least one batch size"),
        ({"stage_seconds": [{"1": -1.0}] * 6}, "greater than 0"),
        ({"n_lanes": 0}, "n_lanes"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_invalid_file_of_stage_times_is_refused_with_the_reason(tmp_path, shipped_times, change, told):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**json.loads(shipped_times.read_text()), **change}))
    with pytest.raises(StageTimesError, match="--save-stage-times writes such a file") as refused:
        StageTimes.load(path)
    assert told in str(refused.value)
    path.write_text("{")
    with pytest.raises(StageTimesError, match=r"wrong\.json"):
        StageTimes.load(path)


def test_a_precision_that_a_bundle_does_not_have_is_refused(tmp_path, capsys):
    code, _, err = plan(capsys, "--model", tiny_bundle(tmp_path / "tiny"), "--rate", "9", "--precision", "int8")
    assert code == 2
    assert "it has no int8 stages" in err


def test_times_of_another_network_are_refused(tmp_path, capsys, shipped_times):
    code, _, err = plan(
        capsys, "--model", tiny_bundle(tmp_path / "tiny"), "--rate", "9", "--stage-times", shipped_times
    )
    assert code == 2
    assert "6 stages" in err
    assert "has 4" in err
