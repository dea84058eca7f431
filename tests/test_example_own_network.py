"""A network defined outside the packages goes through staging, training, export and a real server unchanged."""

import io
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from examples.own_network import SHAPES, ResidualNetwork, draw_shapes, load_network, main, train
from models.bundle import load_bundle
from models.cost import measure_cost
from tests.service.process import running_server
from training.augment import DeviceImages
from training.export import Normalise


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "own-network"
    assert main(["--output", str(path), "--images", "1000", "--epochs", "10"]) == 0
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


def test_larger_images_are_downsampled_in_the_first_layer():
    """So that they cost what small ones do from the first block on."""
    network = ResidualNetwork(5, 64)
    assert network.stem(torch.zeros(2, 3, 64, 64)).shape == (2, 16, 32, 32)
    assert [logits.shape for logits in network(torch.zeros(2, 3, 64, 64))] == [(2, 5)] * 3


def test_no_batch_has_a_single_image():
    """Which a normalisation over the batch refuses, in the midst of the training."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8), torch.nn.BatchNorm1d(8))
    images, labels = draw_shapes(65, seed=1)
    pixels = DeviceImages(images, labels, (0.5,) * 3, (0.25,) * 3, torch.device("cpu"), padding_px=2)
    train(Heads(network), pixels, epochs=1, batch_rows=64)
    assert network[2].num_batches_tracked == 2


class Heads(torch.nn.Module):
    """One exit, as a list."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return [self.network(images)]


NETWORK_OF_ONES_OWN = """
import parts  # beside it


def load(n_classes):
    network = parts.TwoExits(n_classes)
    torch = parts.torch
    torch.manual_seed(7)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def nothing(n_classes):
    return None


def one_tensor(n_classes):
    return parts.Answering(n_classes, lambda logits: logits)


def named(n_classes):
    return parts.Answering(n_classes, lambda logits: {"early": logits})


def of_three(n_classes):
    return parts.TwoExits(3)


def of_seven(n_classes):
    return parts.TwoExits(7)


def of_another_size(n_classes):
    return parts.torch.nn.Sequential(parts.torch.nn.Flatten(), parts.torch.nn.Linear(7, n_classes))


def that_branches(n_classes):
    return parts.Answering(n_classes, lambda logits: [logits] if logits.sum() > 0 else [-logits])


def dearest_first(n_classes):
    class Reversed(parts.TwoExits):
        def forward(self, images):
            return super().forward(images)[::-1]

    return Reversed(n_classes)


def not_finite(n_classes):
    return parts.Answering(n_classes, lambda logits: [logits / 0.0 - logits / 0.0])


def frozen(n_classes):
    return parts.TwoExits(n_classes).requires_grad_(False)


def diverging(n_classes):  # finite on blank images only
    network = parts.TwoExits(n_classes)
    network.late.weight.data *= 1e38
    network.late.bias.data *= 0.0
    network.second.weight.data *= 1e20
    network.second.bias.data.fill_(-1e19)
    return network


def at_no_cost(n_classes):
    return parts.Answering(n_classes, lambda logits: [logits, logits - logits.mean(1, keepdim=True)])
"""
PARTS = """
import torch


class TwoExits(torch.nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.Conv2d(4, 4, 3, 2, 1)
        self.early, self.late = torch.nn.Linear(4, n_classes), torch.nn.Linear(4, n_classes)

    def forward(self, images):
        x = self.first(images).relu()
        return self.early(x.mean((2, 3))), self.late(self.second(x).relu().mean((2, 3)))


class Answering(torch.nn.Module):
    def __init__(self, n_classes, answer):
        super().__init__()
        self.head, self.answer = torch.nn.Linear(3, n_classes), answer

    def forward(self, images):
        return self.answer(self.head(images.mean((2, 3))))
"""


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "my_network.py").write_text(NETWORK_OF_ONES_OWN)
    return tmp_path / "my_network.py"


def test_a_trained_network_is_packed_unchanged_with_an_image_folder(tmp_path, own_file, capsys):
    images, labels = draw_shapes(300, seed=4)
    for part, rows in (("train", range(240)), ("val", range(240, 300))):
        for row in rows:
            folder = tmp_path / "images" / part / SHAPES[labels[row]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(images[row])).save(folder / f"{row}.png")
    output = tmp_path / "my réseau"
    options = ["--network", f"{own_file}:load", "--epochs", "0", "--data", str(tmp_path / "images")]
    assert main([*options, "--image-size", "64", "--output", str(output)]) == 0
    manifest = load_bundle(output).manifest
    assert (manifest.input.height_px, manifest.class_names) == (64, sorted(SHAPES))
    assert (manifest.data.train_images, manifest.data.heldout_images) == (0, 240)
    assert manifest.name == "my-r-seau"
    assert f"--bundle '{output}'\n" in capsys.readouterr().out
    network = load_network(f"{own_file}:load", len(SHAPES))
    weights = load_file(output / "weights.safetensors")
    assert len(manifest.exits) == 2
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("nowhere.py:load", "there is no file"),
        ("my_network.py", "write FILE.py:NAME"),
        ("my_network.py:other", "does not define 'other'"),
        ("my_network.py:nothing", "does not return a torch.nn.Module"),
    ],
)
def test_a_network_that_cannot_be_imported_is_reported_in_one_line(own_file, monkeypatch, capsys, place, reason):
    monkeypatch.chdir(own_file.parent)
    assert main(["--network", place, "--epochs", "0", "--images", "60", "--output", "bundle"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --network {place}: ")
    assert reason in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("one_tensor", "returns a tensor [2, 6]; it must return a list with a tensor of logits [2, 6]"),
        ("named", "returns a dict; it must return"),
        ("of_three", "returns a list of a tensor [2, 3], a tensor [2, 3]; it must return"),
        ("of_seven", "a tensor [2, 7]; it must return a list with a tensor of logits [2, 6]"),
        ("of_another_size", "fails on images [2, 3, 32, 32] (mat1 and mat2 shapes"),
        ("that_branches", "branch"),
        ("dearest_first", "so leaving early saves nothing: return the cheapest exit first"),
        ("not_finite", "returns logits that are not finite: check its weights"),
        ("at_no_cost", "exit 2 costs no more than exit 1 (counted: convolutions"),
    ],
)
def test_a_network_that_cannot_be_packed_is_reported_before_training(own_file, capsys, monkeypatch, name, reason):
    monkeypatch.setattr("examples.own_network.train", lambda *_: pytest.fail("trained"))
    assert main(["--network", f"{own_file}:{name}", "--images", "60", "--output", str(own_file.parent / "bundle")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert reason in told
    assert told.count("\n") == 1


def test_a_network_that_cannot_be_trained_is_reported_in_one_line(own_file, capsys):
    bundle = own_file.parent / "bundle"
    for name, reason in (("frozen", "does not require grad"), ("diverging", "epoch 1: the loss is no longer a number")):
        assert main(["--network", f"{own_file}:{name}", "--images", "60", "--output", str(bundle)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert reason in told
        assert "pack it as it is: --epochs 0" in told
        assert told.count("\n") == 1
    assert not bundle.exists()


def test_an_output_that_is_no_bundle_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("examples.own_network.train", lambda *_: pytest.fail("trained"))
    (tmp_path / "letter.txt").touch()
    (tmp_path / "file").touch()
    for output, reason in ((tmp_path, "something other than a bundle"), (tmp_path / "file" / "bundle", "file")):
        assert main(["--output", str(output), "--images", "60"]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--epochs=-1", "--images=9", "--image-size=0", "--epochs=many"])
def test_an_option_out_of_range_is_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "bundle"), option])
    assert option.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_too_few_images_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "few" / name / f"{i}.png")
    output = str(tmp_path / "bundle")
    assert main(["--data", str(tmp_path / "few"), "--output", output]) == 2
    assert "8 training images; give 10 or more" in capsys.readouterr().err


def test_a_missing_image_folder_is_reported_in_one_line(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "bundle"), "--data", str(tmp_path / "nowhere")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "nowhere" in told
    assert told.count("\n") == 1


def test_a_bundle_that_cannot_be_written_is_reported_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file" / "bundle"), "--images", "60", "--epochs", "1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert str(tmp_path / "file") in told
