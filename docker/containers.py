"""Tools for `docker.check`: buildah builds images on a Debian base made here, podman runs containers, and Debian's
docker-compose starts the stack through podman's socket.
"""

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = "exitserve-check"
IMAGE = "localhost/exitserve-check"
BASE = f"{IMAGE}/debian:bookworm-slim"
TARGETS = ("cpu", "cuda", "cuda-torch")
SERVER_PORT, PROMETHEUS_PORT, GRAFANA_PORT = 18000, 19090, 13000

PROMETHEUS_IMAGE = """\
FROM {base}
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus \\
 && mkdir /prometheus && chown 65534:65534 /prometheus
ENTRYPOINT ["prometheus"]
"""
# Stand-in: reads the files that Grafana reads, as Grafana's user, and answers health checks.
GRAFANA_IMAGE = """\
FROM {base}
RUN apt-get update && apt-get install --yes --no-install-recommends python3 wget \\
 && mkdir /var/lib/grafana && chown 472 /var/lib/grafana
USER 472
ENTRYPOINT ["python3", "-c", "\\
import http.server, json, os, pathlib\\n\\
assert pathlib.Path(os.environ['GF_SECURITY_ADMIN_PASSWORD__FILE']).read_text().strip()\\n\\
json.loads(pathlib.Path(os.environ['GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH']).read_text())\\n\\
assert list(pathlib.Path('/etc/grafana/provisioning').rglob('*.yml'))\\n\\
pathlib.Path('/var/lib/grafana/written').touch()\\n\\
class Health(http.server.BaseHTTPRequestHandler):\\n\\
    def do_GET(self):\\n\\
        self.send_response(200); self.end_headers()\\n\\
    do_HEAD = do_GET\\n\\
http.server.HTTPServer(('', 3000), Health).serve_forever()"]
"""
CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
"""


class CheckError(Exception):
    """A check failed; the message says which, and what was found."""


class Machine:
    """Runs programs with a minimal environment, so that this machine's settings do not affect the images."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.socket = scratch / "podman.sock"
        (scratch / "containers.conf").write_text(CONTAINERS_CONF)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(Path.home()),
            "STORAGE_DRIVER": os.environ.get("STORAGE_DRIVER", "vfs"),
            "CONTAINERS_CONF": str(scratch / "containers.conf"),
        }

    def run(self, *command: str, fails: bool = False, **variables: str) -> str:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self.environment | variables, capture_output=True, text=True, check=False
        )
        if done.returncode and not fails:
            raise CheckError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout.strip()

    def build(self, dockerfile: Path, tag: str, context: Path, *options: str) -> None:
        # pip gets this machine's CA certificates, for networks with their own certificate authority.
        pip, authorities = self.scratch / "pip.conf", Path("/etc/ssl/certs/ca-certificates.crt")
        trust: list[str] = []
        if authorities.exists():
            pip.write_text("[global]\ncert = /run/host-ca.crt\n")
            trust = ["--volume", f"{authorities}:/run/host-ca.crt:ro", "--volume", f"{pip}:/etc/pip.conf:ro"]
        self.run(
            *("buildah", "bud", "--isolation", "chroot", "--format", "docker", "--layers", *trust),
            *("--file", str(dockerfile), "--tag", tag, *options, str(context)),
        )

    def compose(self, *arguments: str) -> str:
        return self.run(
            *("docker-compose", "--project-name", PROJECT, "--profile", "cpu", *arguments),
            DOCKER_HOST=f"unix://{self.socket}",
            EXITSERVE_IMAGE=IMAGE,
            PROMETHEUS_IMAGE=f"{IMAGE}/prometheus",
            GRAFANA_IMAGE=f"{IMAGE}/grafana",
            EXITSERVE_PORT=str(SERVER_PORT),
            PROMETHEUS_PORT=str(PROMETHEUS_PORT),
            GRAFANA_PORT=str(GRAFANA_PORT),
        )

    def container(self, service: str) -> str:
        label = f"label=com.docker.compose.service={service}"
        return self.run("podman", "ps", "--all", "--quiet", "--filter", label).splitlines()[0]

    def inside(self, service: str, *command: str, fails: bool = False) -> str:
        return self.run("podman", "exec", self.container(service), *command, fails=fails)

    def inspect(self, service: str, template: str) -> str:
        return self.run("podman", "inspect", self.container(service), "--format", template)

    def log(self, service: str) -> str:
        """A container's standard error."""
        command = ("podman", "logs", self.container(service))
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stderr


def say(what: str) -> None:
    sys.stdout.write(f"[{time.strftime('%H:%M:%S')}] {what}\n")
    sys.stdout.flush()


def expect(condition: bool, what: str, seen: object = "") -> None:
    if not condition:
        raise CheckError(f"expected: {what}; found: {seen}")
    say(f"  ok: {what}")


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        try:
            if condition():
                say(f"  ok: {what}")
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.5)
    raise CheckError(f"expected within {limit_s:g} s: {what}")


def build(machine: Machine) -> None:
    say("building")
    base = machine.scratch / "base.tar"
    machine.run("mmdebstrap", "--variant=minbase", "bookworm", str(base))
    machine.run("podman", "import", "--quiet", str(base), BASE)
    base.unlink()
    for target in TARGETS if os.environ.get("WITH_CUDA") else TARGETS[:1]:
        argument = f"BASE_IMAGE={BASE}"
        machine.build(
            REPOSITORY / "docker/Dockerfile",
            f"{IMAGE}:{target}",
            REPOSITORY,
            "--target",
            target,
            "--build-arg",
            argument,
        )
        size_bytes = int(machine.run("podman", "inspect", f"{IMAGE}:{target}", "--format", "{{.Size}}"))
        say(f"  ok: docker/Dockerfile, target {target}: {size_bytes / 1e6:.0f} MB")
        code = "import service.engine.core; from service.compiled import state; print(state())"
        output = machine.run("podman", "run", "--rm", "--entrypoint", "python", f"{IMAGE}:{target}", "-c", code)
        expect(output.startswith("the engine runs compiled"), "its engine is compiled and loads", output)
        if target != "cpu":
            check_cuda_libraries(machine, target)
    for name, text in (("prometheus", PROMETHEUS_IMAGE), ("grafana", GRAFANA_IMAGE)):
        folder = machine.scratch / name
        folder.mkdir()
        (folder / "Dockerfile").write_text(text.format(base=BASE))
        machine.build(folder / "Dockerfile", f"{IMAGE}/{name}", folder)
        say(f"  ok: a stand-in for {name}")


def check_cuda_libraries(machine: Machine, target: str) -> None:
    links = (
        "for file in /opt/exitserve/lib/python3*/site-packages/onnxruntime/capi/*_cuda.so "
        "/opt/cuda/nvidia/cu13/lib/*.so.* /opt/cuda/nvidia/cudnn/lib/*.so.*; "
        "do case $file in *rdma*) ;; *) ldd $file;; esac; done"  # RDMA is for remote storage only
    )
    linked = machine.run("podman", "run", "--rm", "--entrypoint", "sh", f"{IMAGE}:{target}", "-c", links)
    missing = {line.split()[0] for line in linked.splitlines() if "not found" in line}
    expect(missing == {"libcuda.so.1"}, "only the driver's library is missing", missing)
    if target == "cuda-torch":
        code = "import torch; torch.cuda._compile_kernel; print(torch.version.cuda, torch.backends.cudnn.version())"
        versions = machine.run("podman", "run", "--rm", "--entrypoint", "python", f"{IMAGE}:{target}", "-c", code)
        expect(versions.startswith("13."), "its torch is built for CUDA 13", versions)
        say(f"      CUDA and cuDNN {versions}")


@contextmanager
def podman_service(machine: Machine) -> Iterator[None]:
    """Run podman's API service, and its health checks, which podman itself leaves to systemd; clean up at the end."""
    command = ("podman", "system", "service", "--time", "0", f"unix://{machine.socket}")
    service = subprocess.Popen(command, env=machine.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    over = threading.Event()

    def check_health() -> None:
        while not over.wait(2.0):
            for container in machine.run("podman", "ps", "--quiet", fails=True).split():
                machine.run("podman", "healthcheck", "run", container, fails=True)

    checks = threading.Thread(target=check_health, daemon=True)
    checks.start()
    try:
        wait_for(machine.socket.exists, "podman listens")
        yield
    finally:
        over.set()
        checks.join()
        machine.compose("down", "--volumes", "--timeout", "40")
        for image in (*(f"{IMAGE}:{target}" for target in TARGETS), f"{IMAGE}/prometheus", f"{IMAGE}/grafana", BASE):
            machine.run("podman", "rmi", "--force", image, fails=True)
        service.terminate()
        service.wait()
