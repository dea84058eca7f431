"""Served answers equal those of the PyTorch network evaluated as a whole, whatever images shared a batch. Always with
the tiny bundle; with the trained one and CIFAR-100's test images if available."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from models.bundle import Bundle, load_bundle
from models.exits import confidence, take_exits
from models.registry import build_network
from models.scores import score_exits
from tests.bundles import random_images, tiny_bundle
from tests.data import cifar100_test
from tests.service.apps import PNG, png
from tests.service.process import REPOSITORY, ServerProcess, running_server
from training.export import Normalise

ZOO_BUNDLE = REPOSITORY / "models" / "zoo" / "cifar100-msdnet"
N_IMAGES = {"tiny": 300, "cifar100-msdnet": 1_000}
N_CLIENTS = 32
TIE = 1e-4


@dataclass(frozen=True)
class Offline:
    """Images, and the whole network's logits and scores for them at all N exits."""

    bundle: Bundle
    bodies: list[bytes]
    logits: list[NDArray[np.float32]]  # N of [images, classes]
    scores: NDArray[np.float64]  # [images, N]


@pytest.fixture(scope="module", params=["tiny", "cifar100-msdnet"])
def offline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Offline:
    n_images = N_IMAGES[request.param]
    if request.param == "tiny":
        path, images = tiny_bundle(tmp_path_factory.mktemp("bundle")), random_images(n_images, seed=51)
    else:
        if not (ZOO_BUNDLE / "manifest.json").exists():
            pytest.skip(f"no trained bundle at {ZOO_BUNDLE.relative_to(REPOSITORY)}")
        path, images = ZOO_BUNDLE, cifar100_test()[0][:n_images].copy()  # torch needs them writable
    bundle = load_bundle(path)
    logits = evaluate(bundle, images)
    return Offline(bundle, [png(image) for image in images], logits, score_exits(bundle.score(), logits))


@torch.no_grad()
def evaluate(bundle: Bundle, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Logits [images, classes] of every exit, from the PyTorch network as a whole."""
    manifest = bundle.manifest
    network = build_network(manifest.architecture, manifest.arguments)
    network.load_state_dict(load_file(bundle.path / "weights.safetensors"))
    network.eval()
    normalise = Normalise(manifest.input.mean, manifest.input.std)
    batches = [network(normalise(torch.from_numpy(images[i : i + 100]))) for i in range(0, len(images), 100)]
    return [torch.cat(parts).numpy() for parts in zip(*batches, strict=True)]


@pytest.fixture(scope="module")
def server(offline: Offline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running_server(offline.bundle.path, log, "--device", "cpu") as running:
        yield running


def ask_all(server: ServerProcess, bodies: list[bytes]) -> list[dict[str, Any]]:
    """Send every body, from 32 clients at once; returns the answers in the order of the bodies."""

    async def all_of_them() -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{} for _ in bodies]
        waiting = iter(enumerate(bodies))
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

            async def client() -> None:
                for i, body in waiting:
                    response = await http.post("/classify", content=body, headers=PNG)
                    assert response.status_code == 200, response.text
                    answers[i] = response.json()

            await asyncio.gather(*(client() for _ in range(N_CLIENTS)))
        return answers

    return asyncio.run(all_of_them())


def set_budget(server: ServerProcess, fraction: float) -> dict[str, Any]:
    response = httpx.put(server.url + "/budget", json={"fraction": fraction})
    assert response.status_code == 200, response.text
    state: dict[str, Any] = response.json()
    return state


def assert_answers_are_the_networks(answers: list[dict[str, Any]], offline: Offline) -> None:
    """Label and confidence equal those of the whole network at the exit taken."""
    for i, answer in enumerate(answers):
        logits = offline.logits[answer["exit"] - 1][i]
        expected = float(confidence(logits[None])[0])
        assert answer["confidence"] == pytest.approx(expected, abs=TIE)
        second, first = np.sort(logits)[-2:]
        if first - second > TIE:
            assert answer["class_id"] == int(logits.argmax())
        executed = offline.bundle.costs_mflops[answer["exit"] - 1]
        assert answer["mflops"] == pytest.approx(executed, rel=1e-6)


def test_labels_exits_and_confidences_equal_the_whole_networks(server: ServerProcess, offline: Offline) -> None:
    """With the full cost as budget, thresholds stay at the frontier's end, so the expected exits are known."""
    set_budget(server, 1.0)
    frontier = offline.bundle.frontier()
    thresholds = np.array(frontier.at(1.0).thresholds)
    answers = ask_all(server, offline.bodies)
    assert_answers_are_the_networks(answers, offline)
    exits = take_exits(offline.scores, thresholds)
    differing = [i for i, answer in enumerate(answers) if answer["exit"] != exits[i] + 1]
    for i in differing:  # a score on a threshold may fall to either side
        assert np.abs(offline.scores[i] - thresholds).min() < TIE
    assert len(differing) <= len(answers) // 100
    assert len({answer["exit"] for answer in answers}) > 1
    assert {answer["reason"] for answer in answers} <= {"confident", "final"}


@pytest.mark.parametrize("fraction", [0.4, 0.6])
def test_answers_under_a_budget_are_the_networks_and_all_counts_agree(
    server: ServerProcess, offline: Offline, fraction: float
) -> None:
    state = set_budget(server, fraction)
    ledger, exits = state["ledger"], exit_counts(server)
    answers = ask_all(server, offline.bodies)
    assert_answers_are_the_networks(answers, offline)
    after = httpx.get(server.url + "/budget").json()
    spent = sum(answer["mflops"] for answer in answers)
    assert after["ledger"]["total_mflops"] - ledger["total_mflops"] == pytest.approx(spent, rel=1e-9)
    if after["rolling"]["images"] == len(answers):
        assert after["rolling"]["average_mflops"] == pytest.approx(spent / len(answers), rel=1e-9)
    assert spent <= (len(answers) + after["ledger"]["burst_images"]) * after["average_mflops"]
    taken = Counter((answer["exit"], answer["reason"]) for answer in answers)
    assert {key: count for key, count in (exit_counts(server) - exits).items() if count} == taken
    assert len({exit_ for exit_, _ in taken}) > 1


def exit_counts(server: ServerProcess) -> Counter[tuple[int, str]]:
    text = httpx.get(server.url + "/metrics").text
    return Counter(
        {
            (int(sample.labels["exit"]), sample.labels["reason"]): int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "exitserve_exits_total"
        }
    )


def test_an_answer_does_not_depend_on_other_requests(server: ServerProcess, offline: Offline) -> None:
    set_budget(server, 1.0)
    together = ask_all(server, offline.bodies[:32])
    for body, answer in zip(offline.bodies[:32], together, strict=True):
        alone = httpx.post(server.url + "/classify", content=body, headers=PNG).json()
        for key in ("label", "class_id", "confidence", "top_k", "exit", "reason", "mflops"):
            assert alone[key] == answer[key]
