"""The Dockerfile and its inputs. `make check-containers` builds the images."""

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "docker/Dockerfile"


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    told = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stdout + told.stderr) == (0, "")


def test_gpu_images_have_minutes_to_warm_up_before_they_are_unhealthy() -> None:
    stages = re.split(r"(?m)^FROM .* AS (\S+)$", DOCKERFILE.read_text())
    texts = dict(zip(stages[1::2], stages[2::2], strict=True))
    checks = {name: re.search(r"HEALTHCHECK .*--start-period=(\d+)s.* CMD (.*)", text) for name, text in texts.items()}
    own, gpu = checks["runtime"], checks["runtime-gpu"]
    assert own is not None
    assert gpu is not None
    assert own[2] == gpu[2] == '["python", "-m", "service.health"]'
    assert int(gpu[1]) >= 300 > int(own[1])


def test_cuda_packages_are_pinned_and_fit_the_runtime() -> None:
    text = (REPOSITORY / "docker/requirements-cuda.txt").read_text()
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"nvidia-[a-z0-9-]+==[0-9.]+", pin) for pin in pins)
    named = re.search(r"onnxruntime-gpu ([0-9.]+)", text)
    assert named is not None
    assert f"onnxruntime-gpu=={named[1]};" in (REPOSITORY / "pyproject.toml").read_text()


def test_the_kernels_compiler_has_the_version_of_cuda_that_torch_requires() -> None:
    """torch with CUDA pins this package; with another version, `make setup` fails wherever torch is not the CPU's."""
    pin = r"^ *\"?(nvidia-cuda-nvrtc==[0-9.]+)"
    ours, images = (
        re.findall(pin, (REPOSITORY / name).read_text(), re.MULTILINE)
        for name in ("pyproject.toml", "docker/requirements-cuda.txt")
    )
    assert ours == images != []


def test_the_build_context_contains_only_what_is_copied() -> None:
    patterns = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert patterns[0] == "*"
    sent = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    copied = {
        name
        for line in DOCKERFILE.read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert sent == copied
    assert all((REPOSITORY / name).exists() for name in sent)
    assert {"**/__pycache__", "**/*.so"} <= set(patterns), "what this machine compiled would run in the image"
