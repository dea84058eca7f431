"""ONNX Runtime sends no telemetry, because `models` turns it off."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

LOAD = """
from models.bundle import load_bundle
from models.onnx_weights import load_stage_session
import onnxruntime
bundle = load_bundle("models/zoo/cifar100-msdnet")
load_stage_session(bundle.path, bundle.manifest.stages[0].file, ["CPUExecutionProvider"], onnxruntime.SessionOptions())
"""


def test_nothing_is_reported(tmp_path: Path) -> None:
    """Loading a stage leaves a new home directory empty, where telemetry would store its identifier and queue."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}  # without CI's variables, which turn them off too
    subprocess.run([sys.executable, "-c", LOAD], cwd=REPOSITORY, env=environment, check=True, timeout=120)
    assert list(tmp_path.rglob("*")) == []
