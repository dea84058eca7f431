"""Compiled modules: their state is reported, stale ones cause a warning; `make compile` and `make pure`."""

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from inspect import isfunction
from pathlib import Path

import pytest

from service.compiled import LIBRARY, PACKAGE, compiled_sources, stale_sources, staleness, state
from service.engine.scheduler import Scheduler
from tests.service.process import REPOSITORY, environment, running_server

SUFFIX = EXTENSION_SUFFIXES[0]
COMPILED_S, EARLIER_S, LATER_S = 1_000_000_000, 999_999_999, 1_000_000_001
SCRATCH = shutil.ignore_patterns("*.so", "__pycache__")


def write(path: Path, at_s: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (at_s, at_s))
    return path


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Three modules: one not compiled, one compiled, and one compiled for another Python."""
    package = tmp_path / "service"
    for name in ("budget/ledger.py", "runners/slots.py", "engine/core.py"):
        write(package / name, EARLIER_S)
    for name in (f"runners/slots{SUFFIX}", f"{LIBRARY}{SUFFIX}", "engine/core.cpython-30-x.so"):
        write(package / name, COMPILED_S)
    return package


def test_only_modules_compiled_for_this_python_count(package: Path) -> None:
    assert compiled_sources(package) == {package / "runners/slots.py": package / f"runners/slots{SUFFIX}"}
    assert state(package) == "the engine runs compiled: 1 modules"
    assert staleness(package) is None
    (package / f"runners/slots{SUFFIX}").unlink()
    assert state(package) == "the engine runs as Python, not compiled"


def test_a_source_changed_after_compilation_is_named(package: Path) -> None:
    write(package / "budget/ledger.py", LATER_S)
    assert stale_sources(package) == []
    write(package / "runners/slots.py", LATER_S)
    assert stale_sources(package) == [package / "runners/slots.py"]
    told = staleness(package)
    assert told is not None
    assert all(word in told for word in ("service/runners/slots.py:", "`make compile`", "`make pure`"))


def test_recompiling_may_renew_only_the_shared_library(package: Path) -> None:
    write(package / "runners/slots.py", LATER_S)
    write(package / f"{LIBRARY}{SUFFIX}", LATER_S)
    assert stale_sources(package) == []


def test_compiled_code_without_a_source_is_named(package: Path) -> None:
    (package / "runners/slots.py").unlink()
    assert stale_sources(package) == [package / "runners/slots.py"]


def test_the_reported_state_of_this_installation_is_true() -> None:
    """CI runs it both with the engine compiled and without."""
    compiled = compiled_sources()
    for source in (PACKAGE / f"{name}.py" for name in ("budget/ledger", "engine/core", "runners/slots", "settings")):
        found = PathFinder.find_spec(source.stem, [str(source.parent)])
        assert found is not None
        assert found.origin == str(compiled.get(source, source))
    assert isfunction(Scheduler.pick) == (PACKAGE / "engine/scheduler.py" not in compiled)
    assert bool(compiled) == bool(list(PACKAGE.glob(f"{LIBRARY}*")))


@pytest.fixture
def stale_copy(tmp_path: Path) -> Path:
    """A copy of the server with a stale compiled module, an empty file for a module that it does not import."""
    for name in ("service", "models"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=SCRATCH)
    write(tmp_path / f"service/command{SUFFIX}", COMPILED_S)
    return tmp_path


def test_a_server_logs_its_state_and_warns_of_stale_modules(stale_copy: Path, bundle_path: Path) -> None:
    log = stale_copy / "log"
    script = stale_copy / "serve.py"  # so that its folder comes first on sys.path
    script.write_text("import runpy; runpy.run_module('service', run_name='__main__')")
    with running_server(bundle_path, log, program=(sys.executable, str(script))) as server:
        assert server.stop() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = [(line["level"], line["message"]) for line in lines if "ompiled" in line["message"]]
    assert told == [("warning", staleness(stale_copy / "service")), ("info", "the engine runs compiled: 1 modules")]


def test_pytest_refuses_stale_modules(stale_copy: Path) -> None:
    for name in ("conftest.py", "waiting.py", "service/test_compiled.py"):
        (stale_copy / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / "tests" / name, stale_copy / "tests" / name)
    shutil.copyfile(REPOSITORY / "pyproject.toml", stale_copy / "pyproject.toml")
    asked = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/service/test_compiled.py"]
    done = subprocess.run(asked, cwd=stale_copy, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr == f"ERROR: {staleness(stale_copy / 'service')}\n\n"


def make(verb: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a target of the Makefile in a folder with a minimal virtual environment of this Python."""
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/python").symlink_to(sys.executable)
    shutil.copyfile(REPOSITORY / "Makefile", folder / "Makefile")
    for name in ("pyproject.toml", "constraints.txt", "venv/.compile"):
        (folder / name).touch()
    asked = ["make", "--no-print-directory", verb, "VENV=venv"]
    return subprocess.run(asked, cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=60)


def test_make_compile_without_a_compiler_fails_and_keeps_compiled_modules(package: Path) -> None:
    done = make("compile", package.parent, CC="no-such-compiler")
    assert done.returncode == 2
    assert done.stdout.startswith("error: no C compiler that finds Python.h. Install both (")
    assert len(compiled_sources(package)) == 1


def test_make_pure_leaves_the_sources(package: Path) -> None:
    done = make("pure", package.parent)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in package.rglob("*.*")) == ["core.py", "ledger.py", "slots.py"]


def test_setup_names_the_library_as_the_service_expects_it() -> None:
    assert f'group_name="service.{LIBRARY.removesuffix("__mypyc")}"' in (REPOSITORY / "setup.py").read_text()
