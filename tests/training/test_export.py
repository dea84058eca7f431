"""Exported stages answer like the network at every batch size, and store no weight twice."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_model
from safetensors.numpy import load_file
from torch import nn

from models.onnx_weights import StageLoadError, load_stage_session
from models.registry import build_network
from models.staging import StagingError
from tests.models.networks import Chunks, InPlace, TwoExits, randomise_statistics
from training.calibration import round_to_half
from training.export import Normalise, export_stages

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
# Three exits, so that there is one in the middle, and few layers, as each takes long to export.
ARGUMENTS = {
    "config": "C-batch-4",
    "n_blocks": 3,
    "base": 1,
    "step": 1,
    "n_channels": 4,
    "growth_rate": 4,
    "bottleneck": False,
    "temperatures": [0.5, 0.3, 0.7],
}
Values = dict[str, NDArray[Any]]


class Exported:
    """A network, the folder it was exported to, and its stages loaded from there."""

    def __init__(self, network: nn.Module, size_px: int | tuple[int, int], folder: Path) -> None:
        self.network, self.folder = randomise_statistics(network).eval(), folder
        self.stages = export_stages(network, size_px, MEAN, STD, folder)
        self.sessions = [load_stage_session(folder, stage["file"]) for stage in self.stages]

    def run(self, images: NDArray[np.uint8]) -> tuple[list[NDArray[np.float32]], Values]:
        state: Values = {"images": images}
        logits = []
        for session, stage in zip(self.sessions, self.stages, strict=True):
            names = [value["name"] for value in stage["outputs"]]
            outputs = session.run(names, {value["name"]: state[value["name"]] for value in stage["inputs"]})
            state.update(zip(names, outputs, strict=True))
            logits.append(outputs[0])
        return logits, state

    @torch.no_grad()
    def run_whole(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        return [logits.numpy() for logits in self.network(Normalise(MEAN, STD)(torch.from_numpy(images)))]


def random_images(n_rows: int, height_px: int = 32, width_px: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(n_rows).integers(0, 256, (n_rows, height_px, width_px, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    return Exported(build_network("msdnet", ARGUMENTS), 32, tmp_path_factory.mktemp("exported"))


def test_stages_answer_as_the_network_does(exported):
    images = random_images(16)
    for served, whole in zip(exported.run(images)[0], exported.run_whole(images), strict=True):
        assert served.dtype == np.float32
        np.testing.assert_allclose(served, whole, rtol=0, atol=1e-5)


def test_an_answer_does_not_depend_on_the_batch(exported):
    images = random_images(32)
    together, _ = exported.run(images)
    for n_rows in range(1, 33):
        for part, whole in zip(exported.run(images[:n_rows])[0], together, strict=True):
            assert np.array_equal(part, whole[:n_rows])
    for row in (5, 31):
        for alone, whole in zip(exported.run(images[row : row + 1])[0], together, strict=True):
            assert np.array_equal(alone[0], whole[row])


def test_values_match_their_description(exported):
    _, state = exported.run(random_images(3))
    for session, stage in zip(exported.sessions, exported.stages, strict=True):
        assert [value.name for value in session.get_inputs()] == [value["name"] for value in stage["inputs"]]
        assert [value.name for value in session.get_outputs()] == [value["name"] for value in stage["outputs"]]
        for value in (*session.get_inputs(), *session.get_outputs()):
            assert value.shape[0] == "rows"
        for value in (*stage["inputs"], *stage["outputs"]):
            assert state[value["name"]].shape == (3, *value["shape"])
            assert state[value["name"]].dtype == value["dtype"]
    assert exported.stages[0]["inputs"] == [{"name": "images", "shape": [32, 32, 3], "dtype": "uint8"}]
    assert json.loads(json.dumps(exported.stages)) == exported.stages


def test_state_bytes_count_what_later_stages_read(exported):
    _, state = exported.run(random_images(1))
    made: set[str] = set()
    for number, stage in enumerate(exported.stages, start=1):
        made |= {value["name"] for value in stage["outputs"]}
        read = {value["name"] for later in exported.stages[number:] for value in later["inputs"]}
        assert stage["state_bytes_per_row"] == sum(state[name].nbytes for name in made & read)
    assert exported.stages[-1]["state_bytes_per_row"] == 0


def test_weights_are_stored_once_as_trained(exported):
    stored = load_file(exported.folder / "weights.safetensors")
    trained = {name: value.numpy() for name, value in exported.network.state_dict().items()}
    assert stored.keys() == trained.keys()
    assert all(np.array_equal(stored[name], trained[name]) for name in trained)
    held = 0
    for stage in exported.stages:
        model = onnx.load(exported.folder / stage["file"], load_external_data=False)
        held += sum(len(t.raw_data) for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL)
    assert held < 0.02 * sum(value.nbytes for value in trained.values())


def test_onnx_tools_can_read_a_stage_with_its_external_weights(exported):
    """References use ONNX's external data: the `onnx` package resolves them, and its checker accepts the result."""
    images = random_images(2)
    model = onnx.load(exported.folder / "stages/stage_1.onnx", load_external_data=False)
    load_external_data_for_model(model, str(exported.folder))
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(["logits_1"], {"images": images})[0], exported.run(images)[0][0])


def test_batch_normalisation_is_folded_into_convolutions_at_load(exported, tmp_path):
    """ONNX Runtime fuses it even though the weights are in another file."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    load_stage_session(exported.folder, "stages/stage_1.onnx", session_options=options)

    def operations(path: Path) -> Counter[str]:
        return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)

    stored, optimized = operations(exported.folder / "stages/stage_1.onnx"), operations(tmp_path / "optimized.onnx")
    assert stored["BatchNormalization"] == stored["Relu"] == stored["Conv"] == 7
    assert "BatchNormalization" not in optimized
    assert optimized["FusedConv"] + optimized["Conv"] == stored["Conv"]


def test_graphs_contain_nothing_about_this_machine(exported):
    for path in (exported.folder / "stages").iterdir():
        content = path.read_bytes()
        assert str(Path(__file__).parents[2]).encode() not in content
        assert b"site-packages" not in content
        assert b"pkg.torch" not in content


class Preprocesses(TwoExits):
    """Has a submodule named like a stage's normalisation, with weights of the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocess = Normalise([0.4, 0.5, 0.6], [1.0, 2.0, 3.0])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return super().forward(images * self.preprocess.scale + self.preprocess.shift)


@pytest.mark.parametrize("network", [InPlace, Chunks, Preprocesses], ids=lambda kind: kind.__name__)
def test_networks_defined_elsewhere_are_exported(network, tmp_path, monkeypatch, capsys):
    torch.manual_seed(1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    exported = Exported(network(), (8, 12), tmp_path)
    assert f"{len(exported.stages)}/{len(exported.stages)} [" in capsys.readouterr().err  # progress by stage
    images = random_images(5, 8, 12)
    for served, whole in zip(exported.run(images)[0], exported.run_whole(images), strict=True):
        np.testing.assert_allclose(served, whole, rtol=0, atol=1e-5)
    for alone, together in zip(exported.run(images[:1])[0], exported.run(images)[0], strict=True):
        assert np.array_equal(alone[0], together[0])


def test_normalise_equals_its_definition():
    images = random_images(4)
    expected = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    actual = Normalise(MEAN, STD)(torch.from_numpy(images)).numpy()
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)


def test_a_network_that_cannot_be_staged_leaves_no_files(tmp_path):
    class NoList(TwoExits):
        def forward(self, images):
            return super().forward(images)[1]

    with pytest.raises(StagingError, match="does not return a list"):
        export_stages(NoList(), 8, MEAN, STD, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_missing_or_damaged_stage_is_reported(exported, tmp_path):
    with pytest.raises(StageLoadError, match=r"nowhere.onnx: No such file.*restore"):
        load_stage_session(exported.folder, "stages/nowhere.onnx")
    (tmp_path / "stage_1.onnx").write_bytes((exported.folder / "stages/stage_1.onnx").read_bytes())
    with pytest.raises(StageLoadError, match=r"(?s)stage_1.onnx.*weights.safetensors.*export the bundle again"):
        load_stage_session(tmp_path, "stage_1.onnx")  # without its weights
    (tmp_path / "stage_1.onnx").write_bytes(b"not a graph")
    with pytest.raises(StageLoadError, match=r"(?s)stage_1.onnx"):
        load_stage_session(tmp_path, "stage_1.onnx")


def test_only_weights_of_layers_are_rounded_to_half_precision():
    network = randomise_statistics(build_network("msdnet", ARGUMENTS))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    round_to_half(network)
    for name, value in network.state_dict().items():  # normalisation and biases have a wide range
        assert torch.equal(value, before[name].half().float() if value.ndim > 1 else before[name]), name


def test_half_precision_weights_take_half_the_space_and_give_the_same_answers(tmp_path):
    torch.manual_seed(1)
    network = build_network("msdnet", {**ARGUMENTS, "n_blocks": 2, "temperatures": 0.5})
    round_to_half(network)
    halved = Exported(network, 32, tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    for name, value in network.state_dict().items():
        assert stored[name].dtype == (np.float16 if value.ndim > 1 else value.numpy().dtype), name
        assert np.array_equal(stored[name].astype(value.numpy().dtype), value.numpy()), name
    whole_bytes = sum(value.nbytes for value in network.state_dict().values())
    assert (tmp_path / "weights.safetensors").stat().st_size < 0.7 * whole_bytes
    images = random_images(5)
    for served, whole in zip(halved.run(images)[0], halved.run_whole(images), strict=True):
        np.testing.assert_allclose(served, whole, rtol=0, atol=1e-5)
    # Loading widens the weights and folds normalisation into them, so neither is done per image.
    for stage in halved.stages:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        load_stage_session(tmp_path, stage["file"], session_options=options)
        nodes = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
        assert nodes["BatchNormalization"] == 0
        assert nodes["Cast"] == (1 if stage is halved.stages[0] else 0)  # of the image
