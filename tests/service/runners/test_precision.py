"""Serving in int8: other stages, scores and thresholds, but the same API; only on request."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from models.bundle import BundleError, load_bundle
from service.command_line import load_settings
from service.runners import choice, precision
from service.runners.base import RunnerError
from service.runners.onnx import OnnxRunner
from service.runners.precision import at_precision
from tests.bundles import random_images, tiny_int8_bundle
from tests.service.apps import PNG, Http, build_app, png, serving
from tests.service.process import running_server


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_int8_bundle(tmp_path_factory.mktemp("int8") / "bundle")


@pytest.fixture(scope="module")
def http(path: Path) -> Iterator[Http]:
    with serving(build_app(path, precision="int8")) as http:
        yield http


def test_the_default_is_fp32(path):
    assert load_settings([]).precision == "fp32"
    assert at_precision(load_bundle(path), "fp32", "auto", "cpu").precision == "fp32"


def test_int8_is_refused_for_bundles_without_it(bundle_path):
    with pytest.raises(BundleError, match="it has no int8 stages; make them with `python -m training quantize`"):
        at_precision(load_bundle(bundle_path), "int8", "auto", "cpu")


def test_int8_is_for_cpus(path):
    bundle = load_bundle(path).at("int8")
    with pytest.raises(RunnerError, match="choose the device cpu or auto, or the precision fp32"):
        choice.open_runner(bundle, device="cuda")
    assert isinstance(choice.open_runner(bundle), OnnxRunner)


@pytest.mark.parametrize(("fp32_s", "int8_s", "taken"), [(2.0, 1.0, "int8"), (1.05, 1.0, "fp32"), (1.0, 2.0, "fp32")])
def test_auto_takes_int8_only_if_clearly_faster(path, monkeypatch, fp32_s, int8_s, taken):
    monkeypatch.setattr(precision, "_seconds", lambda *bundles: [fp32_s, int8_s])
    assert at_precision(load_bundle(path), "auto", "auto", "cpu").precision == taken


@pytest.mark.parametrize(
    ("runner", "device", "n_gpus", "taken"),
    [
        ("auto", "auto", 0, "int8"),
        ("auto", "cpu", 1, "int8"),
        ("auto", "auto", 1, "fp32"),  # for torch, even if ONNX Runtime has no CUDA
        ("torch-cuda", "auto", 0, "fp32"),  # that there is none is told by who opens it: it is asked for
        ("onnx", "cuda", 0, "fp32"),
    ],
)
def test_auto_takes_int8_only_on_cpus(path, monkeypatch, runner, device, n_gpus, taken):
    monkeypatch.setattr(precision, "_seconds", lambda *bundles: [2.0, 1.0])
    monkeypatch.setattr(choice, "cuda_device_count", lambda: n_gpus)
    assert at_precision(load_bundle(path), "auto", runner, device).precision == taken


def test_auto_measures_both_and_does_without_int8(path, bundle_path):
    bundle = load_bundle(path)
    assert bundle.int8 is not None
    assert all(0 < seconds < 60 for seconds in precision._seconds(bundle, bundle.int8))
    assert at_precision(bundle, "auto", "auto", "cpu").precision in ("fp32", "int8")
    assert at_precision(load_bundle(bundle_path), "auto", "auto", "cpu").precision == "fp32"


def test_row_state_is_a_quarter_and_regrouping_changes_no_answer(path):
    runner = OnnxRunner(load_bundle(path).at("int8"), max_rows=16, n_lanes=1)
    images = random_images(16, seed=3)
    together = [runner.first_state(image) for image in images]
    alone = [[state] for state in together]
    rows = together
    for stage in range(runner.n_stages):
        output = runner.run(stage, rows)
        ran_alone = [runner.run(stage, state) for state in alone]
        np.testing.assert_array_equal(output.logits, np.concatenate([ran.logits for ran in ran_alone]))
        maps = [value for value in output.block.values.values() if value.ndim == 4]
        assert all(value.dtype == np.uint8 for value in maps)
        rows = [output.states[i] for i in np.random.default_rng(stage).permutation(16)]
        alone = [[row] for row in rows]


def test_int8_is_served_with_its_own_frontier_which_is_reported(http, path):
    bundle = load_bundle(path)
    model = http.get("/model").json()
    assert (model["precision"], model["version"]) == ("int8", bundle.manifest.version)
    assert [e["heldout_accuracy"] for e in model["exits"]] == [
        e.heldout_accuracy for e in bundle.at("int8").manifest.exits
    ]
    assert "int8" not in model
    assert "stages" not in model
    assert 'precision="int8"' in http.get("/metrics").text
    answer = http.post("/classify", content=png(random_images(1, seed=5)[0]), headers=PNG)
    assert answer.status_code == 200
    budget = http.get("/budget").json()
    frontier = bundle.at("int8").frontier()
    expected = frontier.at_cost(budget["average_mflops"])
    assert budget["accuracy"] == pytest.approx(expected.accuracy, abs=1e-3)


def test_the_setting_selects_the_precision(path, tmp_path):
    with running_server(path, tmp_path / "log", EXITSERVE_PRECISION="int8") as server:
        assert server.stop() == 0
