"""Int8 stages: made from a bundle alone, measured themselves, and refused for other images than the bundle's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle, load_bundle
from models.exits import outcome
from models.manifest import StageInfo, ValueInfo
from models.scores import score_exits
from tests.bundles import (
    N_HELDOUT,
    N_TRAIN,
    SEED,
    random_images,
    read_manifest,
    seal,
    tiny_bundle,
    tiny_images,
    tiny_int8_bundle,
)
from training import quantisation, quantising, stage_sessions
from training.image_set import DataError, ImageSet, Split
from training.quantisation import quantise_stages
from training.quantising import HEADING, quantise
from training.stage_sessions import StageSessions, Values


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_int8_bundle(tmp_path_factory.mktemp("int8") / "bundle"))


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return tiny_images()


def logits_of(bundle: Bundle, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    return StageSessions(bundle.path, bundle.manifest.stages).run(images, "test")


def test_int8_answers_are_close_to_float_ones(loaded):
    images = random_images(400, seed=7)
    for float_logits, int8_logits in zip(logits_of(loaded, images), logits_of(loaded.at("int8"), images), strict=True):
        assert int8_logits.dtype == np.float32
        assert not np.array_equal(int8_logits, float_logits)
        assert (int8_logits.argmax(axis=1) == float_logits.argmax(axis=1)).mean() > 0.9
        assert np.corrcoef(int8_logits.ravel(), float_logits.ravel())[0, 1] > 0.99


def test_an_answer_does_not_depend_on_the_rows_beside_it(loaded):
    sessions = StageSessions(loaded.path, loaded.at("int8").manifest.stages)
    images = random_images(33, seed=8)
    together = sessions.run(images, "together")
    for n_rows in range(1, 33):
        for part, whole in zip(sessions.run(images[:n_rows], f"{n_rows}"), together, strict=True):
            np.testing.assert_array_equal(part, whole[:n_rows])


def test_weights_are_bytes_of_seven_bits_and_heads_stay_float(loaded):
    for stage in loaded.at("int8").manifest.stages:
        graph = onnx.load(loaded.path / stage.file).graph
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        quantised = [weight for name, weight in weights.items() if name.endswith("weight_quantized")]
        assert quantised
        assert all(weight.dtype == np.int8 and abs(weight.astype(int)).max() <= 64 for weight in quantised)
        [gemm] = [node for node in graph.node if node.op_type == "Gemm"]
        assert weights[gemm.input[1]].dtype == np.float32


def test_weights_have_a_scale_per_channel_and_the_first_convolution_stays_float(loaded):
    for number, stage in enumerate(loaded.at("int8").manifest.stages):
        graph = onnx.load(loaded.path / stage.file).graph
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        widened = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
        n_float = 0
        for conv in (node for node in graph.node if node.op_type == "Conv"):
            if (node := widened.get(conv.input[1])) is None:
                assert shapes[conv.input[1]][1] == 3  # the image's
                n_float += 1
                continue
            assert shapes[node.input[1]] == shapes[node.input[0]][:1]
            assert {a.name: a.i for a in node.attribute}["axis"] == 0
        assert n_float == (number == 0)


def test_ranges_come_from_training_images_only(tmp_path, images, monkeypatch):
    """Held-out images set thresholds and test images measure accuracy, so neither may influence the network."""
    seen = []

    def noted(bundle: Bundle, pixels: NDArray[np.uint8], folder: Path) -> list[dict[str, object]]:
        seen.append(pixels)
        return quantise_stages(bundle, pixels, folder)

    fed, feed = [], quantisation._Feeds.__init__

    def noted_feeds(self: quantisation._Feeds, feeds: Sequence[Values]) -> None:
        fed.append(sum(len(next(iter(values.values()))) for values in feeds))
        feed(self, feeds)

    monkeypatch.setattr(quantising, "quantise_stages", noted)
    monkeypatch.setattr(stage_sessions, "BATCH_ROWS", 8)
    monkeypatch.setattr(quantisation._Feeds, "__init__", noted_feeds)
    quantise(tiny_bundle(tmp_path / "bundle"), images, 20, tmp_path / "made")
    held_out = Split.make(len(images.train_labels), N_HELDOUT, SEED).held_out
    known = {picture.tobytes() for picture in np.delete(images.train_images, held_out, axis=0)}
    assert len(seen[0]) == 20
    assert {picture.tobytes() for picture in seen[0]} <= known
    assert fed == [20] * 4  # all of them, for every stage


def test_row_state_is_stored_as_bytes_except_for_logits(loaded):
    stages, int8 = loaded.manifest.stages, loaded.at("int8").manifest.stages
    for before, after in zip(stages, int8, strict=True):
        for value, quantised in zip(before.outputs, after.outputs, strict=True):
            maps = len(value.shape) == 3
            assert quantised.name == value.name
            assert quantised.dtype == ("uint8" if maps else "float32")
            assert quantised.shape == ([*value.shape[1:], value.shape[0]] if maps else value.shape)
        assert before.state_bytes_per_row / 4 <= after.state_bytes_per_row <= before.state_bytes_per_row / 3


def one_node(kind: str, source: str, target: str, scale: float, zero_point: int = 7) -> onnx.ModelProto:
    """A stage's graph that only widens bytes, or makes them of numbers."""
    numbers = {"scale": np.float32(scale), "zero_point": np.uint8(zero_point)}
    given = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()]
    node = onnx.helper.make_node(kind, [source, *numbers], [target])
    return onnx.ModelProto(graph=onnx.GraphProto(node=[node], initializer=given))


@pytest.mark.parametrize(
    ("readers", "pass_as_bytes"),
    [
        ([(0.5, 7)], True),
        ([(0.50001, 7), (0.5, 7)], True),  # the same but for rounding
        ([(0.5, 8)], False),
        ([(0.5, 7), (0.6, 7)], False),
        ([], False),
    ],
)
def test_values_pass_as_bytes_where_all_stages_give_a_byte_the_same_meaning(
    readers: list[tuple[float, int]], pass_as_bytes: bool
) -> None:
    value, other = (ValueInfo(name=name, shape=[4, 8, 8], dtype="float32") for name in ("map", "other"))
    first = StageInfo(file="1.onnx", inputs=[other], outputs=[value], state_bytes_per_row=0)
    later = StageInfo(file="2.onnx", inputs=[value], outputs=[other], state_bytes_per_row=0)
    given = one_node("DequantizeLinear", "bytes", "map", 0.5)
    taken = [one_node("QuantizeLinear", "map", "bytes", *reader) for reader in readers]
    found = quantisation._byte_borders([first, *[later] * len(readers)], [given, *taken])
    assert found.keys() == ({"map"} if pass_as_bytes else set())


def test_accuracies_and_scores_are_measured_on_int8_stages(loaded, images):
    int8 = loaded.at("int8")
    assert (int8.manifest.version, int8.costs_mflops) == (loaded.manifest.version, loaded.costs_mflops)
    assert int8.manifest.score == loaded.manifest.score
    assert [e.heldout_accuracy for e in int8.manifest.exits] == int8.calibration.correct.mean(axis=0).tolist()
    for bundle in (loaded, int8):
        correct = np.stack([x.argmax(axis=1) == images.test_labels for x in logits_of(bundle, images.test_images)])
        told = [e.test_accuracy for e in bundle.manifest.exits]
        assert told == (correct.mean(axis=1).tolist() if bundle is int8 else [None] * len(correct))
    scores = score_exits(int8.score(), logits_of(int8, images.test_images))
    assert np.isfinite(scores).all()
    assert int8.frontier().thresholds != loaded.frontier().thresholds
    assert int8.manifest.int8 is not None
    assert int8.manifest.int8.range_images == N_TRAIN


def test_float_stages_are_unchanged_and_the_card_describes_both(loaded, tmp_path, images):
    before = load_bundle(tiny_bundle(tmp_path / "before"))
    assert {f: i for f, i in loaded.manifest.files.items() if f in before.manifest.files and f != "README.md"} == {
        f: i for f, i in before.manifest.files.items() if f != "README.md"
    }
    assert loaded.at("fp32").manifest.stages == before.manifest.stages
    # Quantising in place again leaves no duplicates.
    again = quantise(tiny_int8_bundle(tmp_path / "again"), images, N_TRAIN, tmp_path / "again")
    assert again.bundle.manifest.version == loaded.manifest.version
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.count(HEADING) == 1
    # Early exit is measured on test images, at thresholds that the held-out images set.
    int8, frontier = again.bundle.at("int8"), again.bundle.at("int8").frontier()
    logits = logits_of(int8, images.test_images)
    scores = score_exits(int8.score(), logits)
    correct = np.stack([x.argmax(axis=1) == images.test_labels for x in logits], axis=1)
    for point in again.int8.budgets:
        thresholds = frontier.at_cost(point.fraction * int8.costs_mflops[-1]).thresholds
        done = outcome(scores, correct, int8.costs_mflops, thresholds)
        assert (point.executed_mflops, point.accuracy) == pytest.approx((done.mean_cost, done.accuracy))
    assert f"| 1 | {100 * again.fp32.test_accuracy[0]:.2f} | {100 * again.int8.test_accuracy[0]:.2f} |" in card


def test_other_images_are_refused(tmp_path, images):
    path = tiny_bundle(tmp_path / "bundle")
    manifest = read_manifest(path)
    manifest["exits"][-1]["test_accuracy"] = 1.0  # tests are labelled with its answers
    seal(path, manifest)
    swapped = replace(images, train_images=images.train_images[::-1].copy())
    fewer = replace(images, train_images=images.train_images[:-1], train_labels=images.train_labels[:-1])
    other = replace(images, class_names=[*images.class_names[:-1], "cat"])
    smaller = replace(images, train_images=images.train_images[:, :16, :16])
    fewer_tests = replace(images, test_images=images.test_images[:-1], test_labels=images.test_labels[:-1])
    other_tests = replace(images, test_labels=images.test_labels[::-1].copy())
    for wrong, why in (
        (swapped, "not the images that the bundle was trained on"),
        (fewer, "so the split differs"),
        (other, "holds the classes noise 0"),
        (smaller, "images of \\(16, 16\\) pixels"),
        (fewer_tests, f"its {len(fewer_tests.test_labels)} test images are not the {len(images.test_labels)} on which"),
        (other_tests, "test images are not the .* measured"),
    ):
        with pytest.raises(DataError, match=why):
            quantise(path, wrong, 10, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_bundle_without_a_split_is_refused(tmp_path: Path, images: ImageSet) -> None:
    path = tiny_bundle(tmp_path / "bundle")
    manifest = read_manifest(path)
    manifest["data"]["split_sha256"] = None
    seal(path, manifest)
    with pytest.raises(DataError, match="has no seed and split"):
        quantise(path, images, 10, tmp_path / "made")


def test_a_bundle_that_was_packed_without_training_is_refused(tmp_path: Path, images: ImageSet) -> None:
    path = tiny_bundle(tmp_path / "bundle")
    manifest = read_manifest(path)
    manifest["data"]["train_images"] = 0
    seal(path, manifest)
    with pytest.raises(DataError, match="packed as it is, with no image to train on"):
        quantise(path, images, 10, tmp_path / "made")
