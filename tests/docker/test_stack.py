"""A real Prometheus, with the rules that ship, scrapes a real server under traffic: every query of the dashboard
returns data, and the values are right."""

import shutil
import socket
import subprocess
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import httpx
import pytest
import yaml

from docker.grafana import ask
from tests.service.process import REPOSITORY, ServerProcess, environment, running_server

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian package prometheus)"
)

BUNDLE = REPOSITORY / "models/zoo/cifar100-msdnet"
IMAGES = [path.read_bytes() for path in sorted((REPOSITORY / "examples/images").glob("*.png"))]
LIMIT_S = 120.0  # about ten seconds suffice on an idle machine


@dataclass
class Stack:
    server: ServerProcess
    prometheus: str  # its URL

    def values(self, expression: str) -> list[float]:
        return ask.values(self.prometheus, expression)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def configuration(folder: Path, server_port: int) -> Path:
    """The configuration that ships, changed to this machine's server and shorter intervals."""
    shutil.copytree(REPOSITORY / "docker/prometheus", folder, dirs_exist_ok=True)
    settings = yaml.safe_load((folder / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    [job] = [job for job in settings["scrape_configs"] if job["job_name"] == "exitserve"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server_port}"]}]
    settings["scrape_configs"] = [job]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    port = free_port()
    settings = ("--lanes", "1", "--device", "cpu", "--budget-fraction", "0.5", "--latency-ms", "10000")
    with running_server(BUNDLE, folder / "server.log", *settings) as server:
        command = (
            "prometheus",
            f"--config.file={configuration(folder / 'prometheus', server.port)}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        )
        with (folder / "prometheus.log").open("w") as log:
            prometheus = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        try:
            yield Stack(server, f"http://127.0.0.1:{port}")
        finally:
            prometheus.terminate()
            prometheus.wait(60)


def test_every_query_returns_data_under_traffic(stack: Stack) -> None:
    limit_s = monotonic() + LIMIT_S
    missing = ["Prometheus does not answer"]
    exits: list[int] = []
    with httpx.Client(base_url=stack.server.url, headers={"Content-Type": "image/png"}) as client:
        while missing and monotonic() < limit_s:
            answers = [client.post("/classify", content=image).raise_for_status().json() for image in IMAGES]
            exits.extend(answer["exit"] for answer in answers)
            sleep(0.2)
            try:
                missing = ask.unanswered(stack.prometheus, "15s")
            except urllib.error.URLError:  # not listening yet
                continue
    assert missing == []
    assert len(set(exits)) > 1

    rules = [rule for group in ask.ask(stack.prometheus, "rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 10
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []

    assert sum(stack.values("exitserve:exit_share:ratio5m")) == pytest.approx(1)
    [cost] = stack.values("exitserve:mflops_per_image:mean5m")
    [saved] = stack.values("exitserve:saved:ratio5m")
    [full] = stack.values("exitserve_full_mflops")
    assert saved == pytest.approx(1 - cost / full, abs=0.2)  # queried one after another, while the means change
    assert 0 < saved < 1
    assert ask.variable_values(stack.prometheus, "model") == ["cifar100-msdnet"]
    assert ask.variable_values(stack.prometheus, "instance") == [f"127.0.0.1:{stack.server.port}"]


def test_every_metric_is_documented(stack: Stack) -> None:
    page = (REPOSITORY / "docs/operations.md").read_text()
    text = httpx.get(stack.server.url + "/metrics").text
    kept = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    assert len(kept) > 20
    assert not [name for name in sorted(kept) if f"`{name}`" not in page]


def test_a_stopped_server_raises_the_alert(stack: Stack) -> None:
    assert stack.server.stop() == 0
    limit_s = monotonic() + LIMIT_S
    while not stack.values('ALERTS{alertname="ExitServeDown"}'):
        assert monotonic() < limit_s
        sleep(0.2)
    [ready] = [query for title, query in ask.questions("15s") if title == "Servers ready"]
    while stack.values(ready) != [0]:  # and not "no data", which would show nothing
        assert monotonic() < limit_s
        sleep(0.2)


def test_an_unknown_dashboard_variable_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown dashboard variable"):
        ask.fill("rate(x[$period])", "1m")


def test_an_unreachable_prometheus_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main([f"http://127.0.0.1:{free_port()}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: http://127.0.0.1:")
    assert told.count("\n") == 1
