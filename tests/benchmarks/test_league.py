"""The comparison with other servers runs and resumes from its command line, with the peers that need no packages."""

import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from typer import BadParameter, Typer
from typer.testing import CliRunner

from benchmarks.league.__main__ import main, read_variants
from benchmarks.league.graph import write_whole_graph
from benchmarks.league.measurement import Measurement, PeerError, Plan
from benchmarks.league.peers.serving import Setup
from benchmarks.league.pictures import Pictures, read_pictures
from benchmarks.league.records import MixedError, Record, Records
from benchmarks.league.roster import Answer, Peer, Places, read_triton
from benchmarks.league.tables import markdown
from models.bundle import BundleError, load_bundle
from models.onnx_weights import load_stage_session
from tests.bundles import random_images, tiny_bundle
from training.image_set import DataError

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux' /proc")


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
    return free


def test_this_service_and_one_peer_are_measured_once(tmp_path: Path, port: int) -> None:
    app = Typer()
    app.command()(main)
    bundle = tiny_bundle(tmp_path / "tiny")
    arguments = ["--bundle", str(bundle), "--python", sys.executable, "--folder", str(tmp_path / "league")]
    arguments += ["--rounds", "1", "--seconds", "0.4", "--points", "1", "--warm-up", "0.1", "--port", str(port)]
    arguments += ["--only", "exitserve", "--only", "fastapi-batching", "--output", str(tmp_path / "table.md")]
    # The single rate that is tried must pass even on a loaded machine.
    arguments += ["--limit-ms", "20000"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    records = Records(tmp_path / "league" / "results.jsonl")
    assert [record.peer for record in records.all] == ["exitserve", "fastapi-batching"]
    for record in records.all:
        assert record.skipped is None
        found = record.finding
        assert found is not None
        assert found["max_rate_per_s"] > 0
        assert found["at_50"]["failures"] == found["at_80"]["failures"] == 0
        assert found["cpu_ms_per_image"] > 0
        assert found["memory_mib"] > 20
        assert 0 <= found["lost_at_stop"] + found["refused_at_stop"] <= 40
        assert found["accuracy"] is None  # the sample images have no labels
    full = load_bundle(bundle).costs_mflops[-1]
    ours, peer = (record.finding for record in records.all)
    assert ours
    assert peer
    assert ours["mmacs_per_answer"] < peer["mmacs_per_answer"] == pytest.approx(full)
    assert "SAMPLE PICTURES" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "league" / "league.png").stat().st_size > 1000
    assert "images/s" in done.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert len(Records(tmp_path / "league" / "results.jsonl").all) == 2
    assert "images/s at p99 <= 20000 ms" in again.output
    other = CliRunner().invoke(app, [*arguments, "--limit-ms", "100"])
    assert isinstance(other.exception, MixedError)
    assert "limit_ms 20000.0, now 100.0" in str(other.exception)


def test_missing_bundles_and_images_are_reported_before_installing(tmp_path: Path) -> None:
    bundle, absent, venv = tiny_bundle(tmp_path / "bundle"), tmp_path / "absent", tmp_path / "venv"
    with pytest.raises(BundleError, match="no such folder"):
        main(bundle=[absent], venv=venv, folder=tmp_path / "league")
    with pytest.raises(DataError, match="no such file or folder"):
        main(bundle=[bundle], data=[absent], venv=venv, folder=tmp_path / "league")
    assert not venv.exists()


def test_variants_take_the_services_options_in_both_forms() -> None:
    given = ["a=--max-batch-rows 8", "b=--max-batch-rows=8 --precision int8"]
    expected = {"a": ["--max-batch-rows", "8"], "b": ["--max-batch-rows=8", "--precision", "int8"]}
    assert read_variants(given) == expected
    for wrong in ("a=--max-batch 8", "a=", "--lanes 1"):
        with pytest.raises(BadParameter):
            read_variants([wrong])


def test_the_whole_graph_gives_the_stages_logits(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path / "tiny"))
    write_whole_graph(bundle, tmp_path / "whole.onnx")
    whole = ort.InferenceSession(str(tmp_path / "whole.onnx"), providers=["CPUExecutionProvider"])
    images = random_images(4)
    values = {bundle.manifest.stages[0].inputs[0].name: images}
    for stage in bundle.manifest.stages:
        session = load_stage_session(bundle.path, stage.file)
        outputs = session.run(None, {value.name: values[value.name] for value in stage.inputs})
        values.update(zip([value.name for value in stage.outputs], outputs, strict=True))
    (logits,) = whole.run(None, {whole.get_inputs()[0].name: images})
    np.testing.assert_allclose(logits, values[bundle.manifest.stages[-1].outputs[0].name], atol=1e-5)


def test_a_server_that_does_not_start_is_reported_with_its_output(tmp_path: Path, port: int) -> None:
    setup = Setup("", "", port, 32, 32, 1, 8, 1.0, 0.4)
    broken = Peer("broken", "Broken", lambda places: [sys.executable, "-c", "raise SystemExit('no such backend')"])
    plan = Plan(seconds=0.1, warm_up_s=0.1, limit_ms=100, max_points=1, resolution=1.1)
    pictures = Pictures("one", "image/png", [b"x"], None)
    with pytest.raises(PeerError, match="no such backend"):
        Measurement(broken, Places(Path(sys.executable), setup, 4), pictures, 1.0, plan).run(tmp_path / "log", None)


def test_image_files_of_the_set_with_the_bundles_classes_are_sent_unchanged(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path / "tiny"))
    sent = read_pictures(bundle, [], 5)
    for k, name in enumerate(bundle.manifest.class_names):
        for part in ("train", "val"):
            folder = tmp_path / "set" / part / name
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(sent.files[k % len(sent.files)])
    found = read_pictures(bundle, [tmp_path / "set"], 5)
    assert found.labels is not None
    assert len(found.labels) == len(set(found.labels)) == 5
    assert [sent.files[label % len(sent.files)] for label in found.labels] == list(found.files)


def test_the_table_includes_unfavourable_and_missing_rows(tmp_path: Path) -> None:
    finding = {
        "max_rate_per_s": 100.0,
        "accuracy": 0.7,
        "mmacs_per_answer": 24.0,
        "at_50": {"p50_ms": 1.0, "p99_ms": 2.0, "failures": 0},
        "at_80": {"p50_ms": 1.0, "p99_ms": 2.0, "failures": 3},
        "cpu_ms_per_image": 1.0,
        "after_hang_up_ms": 5.0,
        "lost_at_stop": 2,
        "refused_at_stop": 1,
        "stop_s": None,
        "memory_mib": 100.0,
        "start_s": 1.0,
    }
    records = Records(tmp_path / "results.jsonl")
    first = Record(
        "net", "images", "exitserve", "ExitServe", 1, {**finding, "max_rate_per_s": 300.0}, None, {"limit_ms": 80.0}
    )
    records.add(first)
    records.add(replace(first, round=2, finding={**finding, "max_rate_per_s": 200.0}))
    records.add(replace(first, peer="slow", title="Slow", finding=finding))
    records.add(replace(first, peer="none", title="None", finding=None, skipped="it has\nno wheel"))
    text = markdown(Records(records.path))
    assert "| ExitServe | 250 (200 to 300) | 70.0 |" in text
    assert "| server | images/s at p99 <= 80 ms | top-1, % |" in text
    assert "Slow | 100 |" in text
    assert "(3 failed)" in text
    assert "2 (1 answered 503), had to be killed" in text
    assert "None could not be measured: it has no wheel" in text
    assert "Slow 3.00" in text
    assert json.loads(records.path.read_text().splitlines()[0])["peer"] == "exitserve"


def test_records_of_another_plan_version_or_settings_are_refused(tmp_path: Path) -> None:
    how = {"seconds": 3.0, "commit": "abc", "version": "1", "settings": None}
    path = tmp_path / "results.jsonl"
    first = Record("net", "images", "exitserve", "ExitServe", 1, None, "not found", how)
    Records(path).add(first)
    Records(path).add(replace(first, peer="small", how={**how, "settings": ["--lanes", "1"]}))
    records, plan = Records(path), {"seconds": 3.0, "commit": "abc"}
    records.require(plan, {"net": "1", "another": "2"}, {"small": ["--lanes", "1"], "one-more": ["--lanes", "2"]})
    records.require(plan, {}, {})
    for wrong, told in (
        (({"seconds": 9.0, "commit": "abc"}, {"net": "1"}, {}), r"exitserve on net .* \(seconds 3\.0, now 9\.0\)"),
        (({"seconds": 3.0, "commit": "def"}, {"net": "1"}, {}), "commit abc, now def"),
        ((plan, {"net": "2"}, {}), "version 1, now 2"),
        ((plan, {"net": "1"}, {"small": ["--lanes", "2"]}), "small on net .*settings"),
    ):
        with pytest.raises(MixedError, match=told):
            records.require(*wrong)
    path.write_text(path.read_text().replace(json.dumps(how), "{}"))
    with pytest.raises(MixedError, match=r"seconds None, now 3\.0"):
        Records(path).require(plan, {}, {})


def test_an_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    record = Record("net", "images", "exitserve", "ExitServe", 1, None, "not found")
    Records(path).add(record)
    with path.open("a") as file:
        file.write('{"network": "net", "im')
    Records(path).add(replace(record, round=2))
    assert [found.round for found in Records(path).all] == [1, 2]


def test_tritons_binary_answer_is_parsed() -> None:
    head = {
        "outputs": [
            {"name": "confidence", "parameters": {"binary_data_size": 4}},
            {"name": "class_id", "parameters": {"binary_data_size": 4}},
        ]
    }
    body = json.dumps(head).encode() + b"\xff\xbe\x00\x3f" + (517).to_bytes(4, "little")
    assert read_triton(body) == Answer(517)
