"""Builds the images, runs the stack and checks it: `make check-containers`, as root.

It needs neither Docker nor a public registry (see `containers`): Debian's Prometheus replaces the public image. Grafana
is not available this way, so a stand-in checks its inputs, and the dashboard's queries are run against Prometheus.

    apt-get install --no-install-recommends buildah podman runc mmdebstrap docker-compose netavark aardvark-dns iptables
    make check-containers              # about 5 minutes; WITH_CUDA=1 builds the other images too (6 GB of downloads)

Uses only the standard library. Prints a line per check and stops at the first that fails.
"""

import http.client
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from docker.containers import (
    PROMETHEUS_PORT,
    REPOSITORY,
    SERVER_PORT,
    CheckError,
    Machine,
    build,
    expect,
    podman_service,
    say,
    wait_for,
)
from docker.grafana import ask

TOOLS = ("buildah", "podman", "runc", "mmdebstrap", "docker-compose", "make")
SERVER = f"http://127.0.0.1:{SERVER_PORT}"
PROMETHEUS = f"http://127.0.0.1:{PROMETHEUS_PORT}"
IMAGES = sorted((REPOSITORY / "examples/images").glob("*.png"))
PNG = {"Content-Type": "image/png"}


def call(path: str, body: bytes | None = None, method: str = "GET", **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(SERVER + path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    request.method = method
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def check_confinement(machine: Machine) -> None:
    say("the server's container")
    expect(machine.inside("server-cpu", "id", "-u") == "10001", "it does not run as root")
    write = "for folder in / /app /opt /etc /usr /tmp; do touch $folder/x && echo $folder; done"
    written = machine.inside("server-cpu", "sh", "-c", write, fails=True)
    expect(written == "/tmp", "it can only write to /tmp", written)
    status = machine.inside("server-cpu", "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    expect(int(fields["CapBnd"], 16) == 0, "it has no capabilities")
    expect(fields["NoNewPrivs"] == "1", "it cannot gain privileges")
    search = "command -v pip pip3 gcc cc make curl wget git"
    found = machine.inside("server-cpu", "sh", "-c", search, fails=True)
    expect(found == "", "it contains no build tools", found)
    log = machine.log("server-cpu")
    expect('"the engine runs compiled: ' in log, "its engine runs compiled", log)
    expect('"level":"warning"' not in log, "it logs no warnings", log)
    machine.inside("server-cpu", "python", "-m", "service.health")
    say("  ok: python -m service.health")


def check_server() -> None:
    say("the server")
    status, answer = call("/classify", IMAGES[0].read_bytes(), "POST", **PNG)
    expect(status == 200 and answer["label"], f"{IMAGES[0].name} is classified: {answer.get('label')}", answer)
    # With a latency target, because some panels of the dashboard are empty without one.
    wish = json.dumps({"fraction": 0.4, "latency_ms": 10_000}).encode()
    kind = {"Content_Type": "application/json"}
    expect(call("/budget", wish, "PUT", **kind)[0] == 401, "without the token, setting the budget is refused")
    token = (REPOSITORY / "docker/secrets/admin-token").read_text().strip()
    status, state = call("/budget", wish, "PUT", Authorization=f"Bearer {token}", **kind)
    expect(status == 200 and state["fraction"] == 0.4, "with the token of docker/secrets, it is set", state)


def check_monitoring() -> None:
    say("Prometheus")

    def scraped() -> bool:
        targets = ask.ask(PROMETHEUS, "targets", state="active")["activeTargets"]
        return any(t["scrapeUrl"] == "http://server:8000/metrics" and t["health"] == "up" for t in targets)

    wait_for(scraped, "it scrapes the server by its service name")

    def answered() -> bool:
        for path in IMAGES:
            call("/classify", path.read_bytes(), "POST", **PNG)
        return not ask.unanswered(PROMETHEUS, "1m")

    wait_for(answered, "every query of the dashboard returns data under real traffic")
    rules = [rule for group in ask.ask(PROMETHEUS, "rules")["groups"] for rule in group["rules"]]
    expect(
        len(rules) > 10 and {rule["health"] for rule in rules} == {"ok"}, f"its {len(rules)} rules are evaluated", rules
    )
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    expect(firing == [], "no alert fires", firing)


def check_drain(machine: Machine) -> None:
    say("stopping")
    body = IMAGES[0].read_bytes()
    slow = http.client.HTTPConnection("127.0.0.1", SERVER_PORT, timeout=60)
    slow.putrequest("POST", "/classify")
    for name, value in (PNG | {"Content-Length": str(len(body))}).items():
        slow.putheader(name, value)
    slow.endheaders(body[: len(body) // 2])
    time.sleep(0.5)  # until the server has received it
    container = machine.container("server-cpu")
    stop = threading.Thread(target=machine.compose, args=("stop", "server-cpu"))
    stop.start()
    wait_for(lambda: call("/readyz")[0] == 503, "while stopping, it is not ready but still answers")
    slow.send(body[len(body) // 2 :])
    expect(slow.getresponse().status == 200, "a request that it had begun to receive is answered")
    stop.join()
    code = machine.run("podman", "inspect", container, "--format", "{{.State.ExitCode}}")
    expect(code == "0", "it exits with code 0", code)


def is_healthy(machine: Machine, service: str) -> bool:
    return machine.inspect(service, "{{.State.Health.Status}}") == "healthy"


def main() -> int:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        sys.stderr.write(f"error: needs root and {', '.join(missing or TOOLS)}; see docker/check.py\n")
        return 2
    try:
        with ExitStack() as stack:
            machine = Machine(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            machine.run("make", "secrets")
            build(machine)
            stack.enter_context(podman_service(machine))
            say("docker-compose up: server-cpu, prometheus, grafana's stand-in")
            machine.compose("up", "--detach", "server-cpu", "prometheus", "grafana")
            wait_for(lambda: call("/readyz")[0] == 200, "the server is ready")
            for service in ("server-cpu", "prometheus", "grafana"):
                wait_for(partial(is_healthy, machine, service), f"{service} is healthy")
            check_confinement(machine)
            check_server()
            check_monitoring()
            check_drain(machine)
    except CheckError as error:
        sys.stderr.write(f"FAILED: {error}\n")
        return 1
    say("all checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
