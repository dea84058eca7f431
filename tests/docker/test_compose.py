"""docker-compose.yml: valid, hardened and consistent with the server's settings. `make check-containers` runs the
stack."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
SERVERS = ("server", "server-cpu")
SERVICES = (*SERVERS, "prometheus", "grafana")
TEXT = (REPOSITORY / "docker-compose.yml").read_text()


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(TEXT)
    return parsed


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose (Debian package) is not installed")
def test_docker_compose_accepts_it() -> None:
    told = subprocess.run(
        ["docker-compose", "config", "--quiet"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert (told.returncode, told.stdout + told.stderr) == (0, "")


def test_one_server_per_profile_and_the_gpu_by_default(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert tuple(services) == SERVICES
    assert services["server"]["profiles"] == ["gpu"]
    assert services["server-cpu"]["profiles"] == ["cpu"]
    assert "COMPOSE_PROFILES=gpu" in (REPOSITORY / ".env").read_text().splitlines()
    [device] = services["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "reservations" not in services["server-cpu"]["deploy"]["resources"]
    # Prometheus scrapes `server`, whichever variant runs.
    assert services["server-cpu"]["networks"]["default"]["aliases"] == ["server"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["pids_limit"] > 0
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert not any(word in service for word in ("privileged", "cap_add", "network_mode", "pid", "ipc"))
    for port in service["ports"]:
        assert re.match(r"127\.0\.0\.1:|\$\{[A-Z_]+:-127\.0\.0\.1\}:", port), "from other machines only on demand"
    for volume in service.get("volumes", ()):
        source, _, rest = volume.rpartition("}:") if volume.startswith("${") else volume.partition(":")
        assert rest.endswith(":ro") or not source.startswith((".", "/", "$")), "folders of the host are only read"


def test_prometheus_is_reachable_from_this_host_only(compose: dict[str, Any]) -> None:
    assert all(port.startswith("127.0.0.1:") for port in compose["services"]["prometheus"]["ports"])


@pytest.mark.parametrize("name", SERVERS)
def test_the_grace_period_exceeds_the_drain_time(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    drain_s = float(service["environment"]["EXITSERVE_DRAIN_S"])
    grace = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
    assert grace is not None
    assert float(grace[1]) >= drain_s + 10


def test_the_servers_variables_are_settings(compose: dict[str, Any]) -> None:
    known = {f"EXITSERVE_{name.upper()}" for name in Settings.model_fields}
    for name in SERVERS:
        assert set(compose["services"][name]["environment"]) <= known


def test_it_contains_no_secrets(compose: dict[str, Any]) -> None:
    assert {secret["file"].split(":-")[1].rstrip("}") for secret in compose["secrets"].values()} == {
        "./docker/secrets/admin-token",
        "./docker/secrets/grafana-password",
    }
    assert not re.search(r"(PASSWORD|TOKEN)\w*: (?!/run/secrets/)", TEXT)


def test_third_party_images_are_pinned(compose: dict[str, Any]) -> None:
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"\$\{[A-Z_]+:-[a-z]+/[a-z]+:v?\d+\.\d+\.\d+\}", compose["services"][name]["image"])


def test_secrets_are_created_once(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    folder = tmp_path / "docker/secrets"
    folder.mkdir(parents=True)

    def made() -> list[str]:
        subprocess.run(["make", "secrets"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
        return [(folder / name).read_text() for name in ("admin-token", "grafana-password")]

    first = made()
    assert all(len(secret.strip()) == 32 for secret in first)
    assert len(set(first)) == 2
    assert made() == first
    assert folder.stat().st_mode & 0o077 == 0, "only their owner may look them up"
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in folder.iterdir()), "and the containers' users read them"
    Settings(admin_token=first[0].strip())


def test_every_variable_is_documented() -> None:
    page = (REPOSITORY / "docs/operations.md").read_text()
    variables = set(re.findall(r"\$\{([A-Z_]+)", TEXT))
    assert variables
    assert not [name for name in sorted(variables) if f"`{name}`" not in page]
