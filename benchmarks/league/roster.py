"""Who takes part: how each server is started, asked and read. How it is configured, and why, its own file says."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.league.environment import library_folder
from benchmarks.league.peers.serving import Setup

PEERS = "benchmarks.league.peers"


@dataclass(frozen=True)
class Places:
    """What a command may refer to."""

    python: Path  # of the peers' environment
    setup: Setup
    n_exits: int


@dataclass(frozen=True)
class Answer:
    """What a server said of an image."""

    class_id: int
    mflops: float | None = None  # None: the whole network


Command = Callable[[Places], list[str]]


def read_json(body: bytes) -> Answer:
    told = json.loads(body)
    return Answer(told["class_id"], told.get("mflops"))


def read_triton(body: bytes) -> Answer:
    """A request that is all tensor is answered so: a JSON head, then the outputs' bytes in its order."""
    head, start = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    for output in head["outputs"]:
        n_bytes = output["parameters"]["binary_data_size"]
        if output["name"] == "class_id":
            return Answer(int.from_bytes(body[start : start + n_bytes], "little"))
        start += n_bytes
    raise ValueError("Triton's answer has no class_id")


@dataclass(frozen=True)
class Peer:
    """One row of the league."""

    name: str
    title: str
    command: Command
    path: str = "/classify"
    headers: Mapping[str, str] = field(default_factory=dict)
    environment: Callable[[Places], Mapping[str, str]] = lambda places: {}
    read: Callable[[bytes], Answer] = read_json
    imports: Sequence[str] = ()  # packages it needs in the peers' environment; none: it runs in the project's own


def _module(name: str, *arguments: str) -> Command:
    return lambda places: [str(places.python), "-m", f"{PEERS}.{name}", *arguments]


def _mosec(name: str) -> Command:
    return lambda places: [
        *_module(name)(places),
        "--address",
        "127.0.0.1",
        "--port",
        str(places.setup.port),
        "--log-level",
        "warning",
        "--timeout",
        "60000",
    ]


def _bentoml(places: Places) -> list[str]:
    command = str(places.python.with_name("bentoml"))
    service = f"{PEERS}.bentoml_batching:Classifier"
    return [command, "serve", service, "--host", "127.0.0.1", "--port", str(places.setup.port)]


def _fastapi_torch(places: Places) -> list[str]:
    app = [f"{PEERS}.fastapi_torch:app", "--port", str(places.setup.port), "--workers", str(places.setup.n_workers)]
    return [sys.executable, "-m", "uvicorn", *app, "--no-access-log", "--log-level", "warning"]


def service(
    name: str, title: str, fraction: float | None, arguments: Sequence[str] = (), path: str = "/classify"
) -> Peer:
    """This service at a budget, with further settings; None for the fraction the league is run at."""

    def command(places: Places) -> list[str]:
        share = places.setup.budget_fraction if fraction is None else fraction
        settings = ["--bundle", places.setup.bundle, "--budget-fraction", str(share), "--port", str(places.setup.port)]
        return [sys.executable, "-m", "service", *settings, "--access-log", "off", *arguments]

    return Peer(name, title, command, path)


def roster(n_exits: int, variants: Mapping[str, Sequence[str]]) -> list[Peer]:
    """Everyone, this service first; `variants` are further rows of it, by name, with the settings they add."""
    return [
        service("exitserve", "**ExitServe**", None),
        *(service(name, f"**ExitServe**, {' '.join(added)}", None, added) for name, added in variants.items()),
        service("exits-off", "ExitServe, exits off", 1.0, path=f"/classify?exit={n_exits}"),
        Peer("fastapi-torch", "FastAPI, torch per request", _fastapi_torch),
        Peer(
            "fastapi-batching",
            "FastAPI, micro-batching",
            lambda places: [sys.executable, "-m", f"{PEERS}.fastapi_batching"],
        ),
        Peer("litserve", "LitServe", _module("litserve_batching"), imports=("litserve",)),
        Peer("mosec", "mosec", _mosec("mosec_one"), "/inference", imports=("mosec",)),
        Peer("mosec-stages", "mosec, a process per stage", _mosec("mosec_stages"), "/inference", imports=("mosec",)),
        Peer(
            "bentoml",
            "BentoML",
            _bentoml,
            environment=lambda places: {"BENTOML_DO_NOT_TRACK": "True"},
            imports=("bentoml",),
        ),
        Peer(
            "ray-serve",
            "Ray Serve",
            _module("ray_serve"),
            environment=lambda places: {"RAY_USAGE_STATS_ENABLED": "0"},
            imports=("ray.serve",),
        ),
        Peer(
            "triton",
            "Triton (PyTriton)",
            _module("triton"),
            "/v2/models/classify/infer",
            # The body is the image alone, without a JSON head.
            headers={"Inference-Header-Content-Length": "0"},
            environment=lambda places: {"LD_LIBRARY_PATH": library_folder(places.python)},
            read=read_triton,
            imports=("pytriton",),
        ),
    ]


def environment(peer: Peer, places: Places) -> dict[str, str]:
    """The variables a server is started with: what it serves, and one thread for every library that would take more."""
    own_folder = places.python.parent
    return {
        "LEAGUE_SETUP": json.dumps(asdict(places.setup)),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # Some start processes by the name `python3`.
        "PATH": f"{own_folder}:/usr/local/bin:/usr/bin:/bin"
        if peer.imports
        else f"{Path(sys.executable).parent}:/usr/bin:/bin",
        **peer.environment(places),
    }
