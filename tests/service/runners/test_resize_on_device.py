"""Images scaled on the device, over HTTP: decoded images arrive there unscaled, and get the same answers as if scaled
on the host. The device is the CPU, with the same programs as on a GPU."""

import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from models.bundle import load_bundle
from service.assembly import build_engine
from service.images.decoder import ImageDecoder
from service.runners.base import RunnerError
from service.runners.blocks import RowState
from service.runners.choice import canvas_px, open_runner
from service.runners.torch_cuda.device import Host
from service.runners.torch_cuda.resize import cut, resize
from service.runners.torch_cuda.runner import TorchCudaRunner, open_torch_runner
from tests.service.apps import Http, build_app, serving
from tests.service.pictures import encoded
from tests.service.process import running_server
from tests.service.runners.test_runner_torch_resize import picture

SIDE_PX, CANVAS_PX = 32, 80
N_PICTURES = 200
# The server's own code, except that the runner uses the CPU as its device.
PROGRAM = """
import sys
from service import assembly
from service.__main__ import main
from tests.service.runners.test_resize_on_device import on_the_processor
assembly.open_runner = on_the_processor
sys.exit(main(sys.argv[1:]))
"""


def on_the_processor(bundle: Any, name: str, **asked: Any) -> TorchCudaRunner:
    """Open torch-cuda like `open_runner`, but on the CPU."""
    size = bundle.manifest.input
    px = 0 if asked["resize"] == "host" else canvas_px(size.height_px, size.width_px)
    rows = asked["max_rows"], asked["max_in_flight_rows"]
    return open_torch_runner(bundle, *rows, asked["n_lanes"], device=Host(), canvas_px=px)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """Counts of the images that reach the runner, by shape."""
    shapes = Counter[tuple[int, ...]]()
    first_state = TorchCudaRunner.first_state

    def counted(runner: TorchCudaRunner, image: NDArray[np.uint8]) -> RowState:
        shapes[image.shape] += 1
        return first_state(runner, image)

    monkeypatch.setattr(TorchCudaRunner, "first_state", counted)
    monkeypatch.setattr("service.assembly.open_runner", on_the_processor)
    return shapes


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [picture(*rng.integers(8, CANVAS_PX + 1, 2).tolist()) for _ in range(N_PICTURES)]


BODIES = [encoded(image) for image in pictures()]
HEADERS = {"Content-Type": "image/png"}
LAST = "/classify?exit=4"


@pytest.fixture(scope="module")
def by_host(folder: Path) -> Iterator[list[Any]]:
    """The answers of a server that scales on the host, with ONNX Runtime."""
    with serving(build_app(folder, runner="onnx", budget_fraction=1.0)) as http:
        yield answers_of(http)


def answers_of(http: Http) -> list[Any]:
    return [response.json() for response in http.post_all(LAST, BODIES, 16, headers=HEADERS)]


def is_same(answers: list[Any], expected: list[Any]) -> None:
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected]
    # With random weights, a grey level changes more answers than in a trained network.
    shares = [[answer["confidence"] for answer in some] for some in (answers, expected)]
    np.testing.assert_allclose(*shares, atol=0.1)


@pytest.mark.parametrize("where", ["auto", "device", "host"])
def test_answers_equal_those_with_scaling_on_the_host(
    folder: Path, seen: Counter[tuple[int, ...]], by_host: list[Any], where: str
) -> None:
    with serving(build_app(folder, resize=where, budget_fraction=1.0)) as http:
        is_same(answers_of(http), by_host)
        sizes = Counter(image.size[::-1] for image in pictures())
        if where == "host":
            assert seen.keys() == {(SIDE_PX, SIDE_PX, 3)}
            return
        for size, n in sizes.items():
            assert seen[*size, 3] >= n
        # The other routes, and an image that is too large to be passed on unscaled.
        large = encoded(picture(300, 200))
        seen.clear()
        stream = http.post("/classify/stream?exit=4", content=BODIES[0], headers=HEADERS).text.splitlines()
        assert '"final":true' in stream[-1]
        form = [("image", (str(i), body, "image/png")) for i, body in enumerate((BODIES[1], large))]
        assert http.post("/classify/batch", files=form).json()["answered"] == 2
        assert seen.keys() == {(*image.size[::-1], 3) for image in pictures()[:2]} | {(SIDE_PX, SIDE_PX, 3)}


def test_images_cross_shared_memory_unscaled(folder: Path, tmp_path: Path, by_host: list[Any]) -> None:
    arguments = ("--http-workers", "2", "--lanes", "2", "--budget-fraction", "1", "--max-in-flight", "64")
    program = (sys.executable, "-c", PROGRAM)
    with running_server(folder, tmp_path / "log", *arguments, "--resize", "device", program=program) as server:
        limits = httpx.Limits(max_connections=8)
        client = httpx.Client(base_url=server.url, headers=HEADERS, limits=limits)
        with client, ThreadPoolExecutor(8) as pool:
            is_same(list(pool.map(lambda body: client.post(LAST, content=body).json(), BODIES)), by_host)
        assert server.stop() == 0


def test_no_value_is_more_than_two_grey_levels_from_the_hosts() -> None:
    left, scaling = (ImageDecoder(SIDE_PX, SIDE_PX, 1_000_000, canvas_px=px) for px in (CANVAS_PX, 0))
    for body in BODIES:
        pixels = left.decode_now(body)
        canvas = torch.zeros((1, CANVAS_PX, CANVAS_PX, 3), dtype=torch.uint8)
        canvas[0, : pixels.shape[0], : pixels.shape[1]] = torch.from_numpy(pixels.copy())
        cuts = torch.tensor([cut(*pixels.shape[:2], (SIDE_PX, SIDE_PX))], dtype=torch.float64)
        for dtype in (torch.float32, torch.float16):
            found = resize(canvas, cuts, (SIDE_PX, SIDE_PX), dtype).numpy()[0]
            assert np.abs(found.astype(int) - scaling.decode_now(body)).max() <= 2


def test_a_runner_that_cannot_scale_is_refused(folder: Path) -> None:
    bundle = load_bundle(folder)
    with pytest.raises(RunnerError, match="which alone scales images there"):
        build_engine(bundle, bundle.costs_mflops[-1], device="cpu", resize="device")
    assert build_engine(bundle, bundle.costs_mflops[-1], device="cpu").canvas_px == 0
    assert not hasattr(open_runner(bundle, device="cpu"), "canvas_px")


def test_canvases_are_a_little_more_than_twice_the_networks_size() -> None:
    assert [canvas_px(side, side) for side in (SIDE_PX, 224)] == [CANVAS_PX, 512]
    assert canvas_px(10, 224) == 512


def test_opaque_upright_and_small_images_are_passed_on_unscaled() -> None:
    plain, scaling = (ImageDecoder(SIDE_PX, SIDE_PX, 1_000_000, canvas_px=px) for px in (CANVAS_PX, 0))
    image, grey = picture(60, 80), picture(11, 9).convert("L")
    for kind in ("PNG", "WEBP", "BMP"):
        more = {"lossless": True} if kind == "WEBP" else {}
        np.testing.assert_array_equal(plain.decode_now(encoded(image, kind, **more)), np.asarray(image))
    np.testing.assert_array_equal(plain.decode_now(encoded(grey)), np.asarray(grey.convert("RGB")))
    assert plain.decode_now(encoded(image, "JPEG")).shape == (60, 80, 3)
    turned, see_through = Image.Exif(), image.copy()
    turned[0x0112] = 6
    see_through.putalpha(128)
    own = picture(SIDE_PX, SIDE_PX)
    for body in (
        encoded(image, "JPEG", exif=turned),
        encoded(see_through),
        encoded(image.quantize(16)),
        encoded(grey, transparency=3),
        encoded(picture(CANVAS_PX + 1, 10)),
        encoded(picture(10, CANVAS_PX + 1), "JPEG"),
        encoded(own),
        encoded(own, "WEBP"),
    ):
        pixels = plain.decode_now(body)
        assert pixels.shape == (SIDE_PX, SIDE_PX, 3)
        np.testing.assert_array_equal(pixels, scaling.decode_now(body))
