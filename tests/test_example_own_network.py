"""A network defined outside the rooms goes through staging, training, export and a real server unchanged."""

import io
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from examples.own_network import SHAPES, ResidualNetwork, draw_shapes, main
from models.bundle import load_bundle
from models.cost import measure_cost
from tests.service.process import running_server
from training.export import Normalise


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "own-network"
    assert main(["--output", str(path), "--images", "1500", "--epochs", "10"]) == 0
    return path


def test_it_learns_and_its_bundle_is_whole(bundle_path):
    bundle = load_bundle(bundle_path)
    assert bundle.manifest.architecture == "onnx"
    assert bundle.manifest.data.name == "synthetic shapes"
    assert max(exit_.heldout_accuracy for exit_ in bundle.manifest.exits) > 1.3 / len(SHAPES)  # chance is one
    cost = measure_cost(ResidualNetwork(len(SHAPES)), 32)
    assert bundle.costs_mflops == tuple(ops / 1e6 for ops in cost.executed)


def test_a_server_answers_as_the_network_does(bundle_path, tmp_path):
    network = ResidualNetwork(len(SHAPES)).eval()
    network.load_state_dict(load_file(bundle_path / "weights.safetensors"))
    images, _ = draw_shapes(40, seed=9)
    with torch.no_grad():
        normalised = Normalise([0.5] * 3, [0.25] * 3)(torch.from_numpy(images))
        probabilities = [logits.softmax(1) for logits in network(normalised)]
    with running_server(bundle_path, tmp_path / "log") as server, httpx.Client(base_url=server.url) as client:
        for wish in ({}, {"exit": 1}, {"exit": 2}, {"exit": 3}):
            for row, pixels in enumerate(images):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                headers = {"Content-Type": "image/png"}
                answer = client.post("/classify", params=wish, content=file.getvalue(), headers=headers).json()
                assert answer["exit"] == wish.get("exit", answer["exit"])
                expected = probabilities[answer["exit"] - 1][row]
                assert answer["confidence"] == pytest.approx(float(expected[answer["class_id"]]), abs=1e-4)
                assert float(expected[answer["class_id"]]) >= float(expected.max()) - 1e-4
        assert server.stop() == 0


def test_an_image_folder_of_ones_own(tmp_path):
    images, labels = draw_shapes(300, seed=4)
    for part, rows in (("train", range(240)), ("val", range(240, 300))):
        for row in rows:
            folder = tmp_path / "images" / part / SHAPES[labels[row]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(images[row])).save(folder / f"{row}.png")
    output = tmp_path / "bundle"
    options = ["--data", str(tmp_path / "images"), "--output", str(output), "--image-size", "64", "--epochs", "1"]
    assert main(options) == 0
    manifest = load_bundle(output).manifest
    assert (manifest.input.height_px, manifest.class_names) == (64, sorted(SHAPES))


def test_a_folder_that_is_not_there_is_told_in_one_line(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "bundle"), "--data", str(tmp_path / "nowhere")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "nowhere" in told
    assert told.count("\n") == 1


def test_a_bundle_that_cannot_be_written_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file" / "bundle"), "--images", "60", "--epochs", "1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert str(tmp_path / "file") in told
