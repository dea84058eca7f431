"""The servers: how each is started, called and parsed. `peers/` has their configurations, with the reasons."""

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
    """What the peers' commands and environments are built from."""

    python: Path  # interpreter of the peers' environment
    setup: Setup
    n_exits: int


@dataclass(frozen=True)
class Answer:
    """A server's answer for one image."""

    class_id: int
    mflops: float | None = None  # None: that of the whole network


Command = Callable[[Places], list[str]]


def read_json(body: bytes) -> Answer:
    document = json.loads(body)
    return Answer(document["class_id"], document.get("mflops"))


def read_triton(body: bytes) -> Answer:
    """Parse the answer to a binary request: a JSON header, then the outputs' bytes in the order of the header."""
    head, start = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    for output in head["outputs"]:
        n_bytes = output["parameters"]["binary_data_size"]
        if output["name"] == "class_id":
            return Answer(int.from_bytes(body[start : start + n_bytes], "little"))
        start += n_bytes
    raise ValueError("Triton's answer has no class_id")


@dataclass(frozen=True)
class Peer:
    """One server, a row of the tables."""

    name: str
    title: str
    command: Command
    path: str = "/classify"
    headers: Mapping[str, str] = field(default_factory=dict)
    environment: Callable[[Places], Mapping[str, str]] = lambda places: {}
    read: Callable[[bytes], Answer] = read_json
    imports: Sequence[str] = ()  # packages needed in the peers' environment; none: it runs in the project's


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
    """This service at a budget, with further settings; `fraction` None means that of the setup."""

    def command(places: Places) -> list[str]:
        share = places.setup.budget_fraction if fraction is None else fraction
        settings = ["--bundle", places.setup.bundle, "--budget-fraction", str(share), "--port", str(places.setup.port)]
        return [sys.executable, "-m", "service", *settings, "--access-log", "off", *arguments]

    return Peer(name, title, command, path)


def roster(n_exits: int, variants: Mapping[str, Sequence[str]]) -> list[Peer]:
    """All servers, this one first; `variants` has extra settings by name, each for one more row of this service."""
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
            # The body is the image alone, without a JSON header.
            headers={"Inference-Header-Content-Length": "0"},
            environment=lambda places: {"LD_LIBRARY_PATH": library_folder(places.python)},
            read=read_triton,
            imports=("pytriton",),
        ),
    ]


def environment(peer: Peer, places: Places) -> dict[str, str]:
    """The environment variables of a server: its setup, and one thread each for libraries that would start more."""
    own_folder = places.python.parent
    return {
        "LEAGUE_SETUP": json.dumps(asdict(places.setup)),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # Some peers start processes as `python3`.
        "PATH": f"{own_folder}:/usr/local/bin:/usr/bin:/bin"
        if peer.imports
        else f"{Path(sys.executable).parent}:/usr/bin:/bin",
        **peer.environment(places),
    }
