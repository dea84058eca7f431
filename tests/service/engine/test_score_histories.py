"""The history that an exit score keeps of a row moves with it, however rows are regrouped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.bundle import Bundle
from models.calibration import Calibration
from models.exits import take_exits
from models.gates import GATE_FEATURES, GateScore
from models.manifest import PredictorInfo
from models.predictor import FEATURES
from models.scores import score_exits
from service.assembly import build_engine
from service.engine.engine import Engine
from service.engine.policies import POLICIES
from service.runners.onnx_device.runner import OnnxDeviceRunner
from tests.bundles import MEAN, STD, random_images, tiny_network
from tests.service.slotted import engine_around
from training.export import Normalise

N_IMAGES = 60
TIE = 1e-4  # a score this close to a threshold may fall to either side


@pytest.fixture(scope="module")
def whole() -> list[NDArray[np.float32]]:
    """The logits [images, classes] of every exit of the PyTorch network, run whole."""
    with torch.no_grad():
        images = torch.from_numpy(random_images(N_IMAGES, seed=7))
        return [x.numpy() for x in tiny_network()(Normalise(MEAN, STD)(images))]


def heldout_logits() -> list[NDArray[np.float32]]:
    """The logits of all exits for the images that the bundle is calibrated on."""
    with torch.no_grad():
        return [x.numpy() for x in tiny_network()(Normalise(MEAN, STD)(torch.from_numpy(random_images(2000, seed=2))))]


def scored_by(bundle: Bundle, name: str) -> Bundle:
    """The bundle with another score; `as_good` is a fitted one, on margins and agreement of two heads."""
    calibration, predictor = bundle.calibration, None
    if name == "as_good":
        weights = np.zeros((len(bundle.manifest.exits), len(FEATURES) + 1))
        weights[:, [FEATURES.index("logit_margin"), FEATURES.index("agrees_x_previous_logit_margin")]] = -1.0
        predictor = PredictorInfo(features=[*FEATURES], gain=weights.tolist(), loss=None)
        # Thresholds from another score's images: any will do, as long as some images leave at each exit.
        calibration = Calibration({name: calibration.scores["logit_margin"]}, calibration.correct)
    if name == "jei_gates":
        weights = np.zeros((len(bundle.manifest.exits), len(GATE_FEATURES) + 1))
        weights[:, GATE_FEATURES.index("confidence")], weights[:, -1] = 8.0, -7.0
        predictor = PredictorInfo(features=[*GATE_FEATURES], gain=weights.tolist(), loss=None)
        scores = score_exits(GateScore(weights), heldout_logits()).astype(np.float32)
        calibration = Calibration({name: scores}, calibration.correct)
    manifest = bundle.manifest.model_copy(update={"score": name, "predictor": predictor})
    return replace(bundle, manifest=manifest, calibration=calibration)


def require_exits(engine: Engine, served: Bundle, whole: list[NDArray[np.float32]]) -> None:
    """Check that images leave an engine without steering where the bundle's score of all heads predicts."""
    engine.start()
    try:
        thresholds = engine.budget_state().thresholds
        answers = [future.result(60) for future in [engine.submit(image) for image in random_images(N_IMAGES, seed=7)]]
    finally:
        engine.drain(60)
    scores = score_exits(served.score(), whole)
    expected = take_exits(scores, thresholds)
    tied = (np.abs(scores - np.array(thresholds)) < TIE).any(axis=1)
    assert len(set(expected.tolist())) >= 3
    assert tied.mean() < 0.2
    assert [answer.exit for answer, tie in zip(answers, tied, strict=True) if not tie] == (expected[~tied] + 1).tolist()


@pytest.mark.parametrize("name", ["patience", "vote", "as_good", "jei_gates"])
@pytest.mark.parametrize("max_rows", [3, 13])
def test_images_leave_where_the_score_of_all_heads_predicts(
    bundle: Bundle, whole: list[NDArray[np.float32]], name: str, max_rows: int
) -> None:
    served = scored_by(bundle, name)
    budget_mflops = 0.5 * (bundle.costs_mflops[0] + bundle.costs_mflops[-1])
    engine = build_engine(
        served, budget_mflops, device="cpu", n_lanes=2, max_rows=max_rows, steer=False, burst_images=1e6
    )
    require_exits(engine, served, whole)


@pytest.mark.parametrize("policy", POLICIES)
def test_in_slots_histories_move_with_rows_under_every_policy(
    bundle: Bundle, whole: list[NDArray[np.float32]], policy: str
) -> None:
    """Policies without compaction once lost the history, so that every batch from stage 2 on failed."""
    served = scored_by(bundle, "vote")
    runner = OnnxDeviceRunner(served, "cpu", max_rows=4, max_in_flight_rows=N_IMAGES, n_lanes=1)
    engine = engine_around(runner, served, policy=policy, steer=False)
    require_exits(engine, served, whole)
