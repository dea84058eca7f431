"""Plain FastAPI: the network in torch, in the route, one image at a time, with one uvicorn worker per core."""

from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from safetensors.torch import load_file

from benchmarks.league.peers.serving import Setup, answers, decode
from models.bundle import load_bundle
from models.registry import build_network

torch.set_num_threads(1)
setup = Setup.from_environment()
app = FastAPI()


def load() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    bundle = load_bundle(Path(setup.bundle))
    manifest = bundle.manifest
    network = build_network(manifest.architecture, manifest.arguments)
    network.load_state_dict({name: x.float() for name, x in load_file(bundle.path / "weights.safetensors").items()})
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (manifest.input.mean, manifest.input.std))
    return network.eval(), 1 / (255 * std), -mean / std


network, scale, shift = load()


@app.post("/classify")
async def classify(request: Request) -> dict[str, Any]:
    pixels = torch.from_numpy(decode(await request.body(), setup).copy())
    with torch.inference_mode():
        logits = network(pixels.permute(2, 0, 1)[None].float() * scale + shift)[-1]
    return answers(logits.numpy())[0]
