"""The commands in README and docs work: every call is made, and every command knows its options."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.service.process import REPOSITORY, ServerProcess, running_server

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
ROOMS = ("models", "training", "service", "examples", "benchmarks", "docker", "tests")
STARTS = ("curl ", "for image in ", "python ", ".venv/bin/python ", "make ", "docker ", "source ")


class Typed(NamedTuple):
    """A command in a document, and the answer printed below it, if any."""

    page: str
    command: str
    answer: str


def commands() -> Iterator[Typed]:
    """All commands in code blocks, with continued lines joined."""
    for page in PAGES:
        lines = re.sub(r"\\\n\s*", "", page.read_text()).splitlines()
        for i, line in enumerate(lines):
            command = line.strip().removeprefix("$ ")
            if line.startswith("    ") and command.startswith(STARTS):
                answer = takewhile(lambda text: text.startswith("    ") and "$ " not in text, lines[i + 1 :])
                yield Typed(page.name, re.split(r"\s{2,}#|\s+# ", command)[0], "\n".join(answer))


def chosen(*starts: str) -> list[Typed]:
    found = [typed for typed in commands() if typed.command.startswith(starts)]
    assert found, "the pages hold none: has their form changed?"
    return found


def name_of(typed: Typed) -> str:
    return f"{typed.page}: {typed.command[:60]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documents mention, in their places."""
    folder = tmp_path_factory.mktemp("reader")
    samples = REPOSITORY / "examples" / "images"
    for name in ("examples", "README.md"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "photos").mkdir()
    for name in ("cat.png", "dog.png", "photos/holiday.jpg"):
        shutil.copyfile(samples / "fox.png", folder / name)
    (folder / "docker" / "secrets").mkdir(parents=True)
    (folder / "docker" / "secrets" / "admin-token").write_text("not asked for here")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with running_server(REPOSITORY / "models" / "zoo" / "cifar100-msdnet", folder / "log") as server:
        yield server


CALLS = chosen("curl ", "for image in ", ".venv/bin/python -m service classify", "python -m service classify")


@pytest.mark.parametrize("typed", CALLS, ids=name_of)
def test_every_call_gets_the_documented_answer(server: ServerProcess, folder: Path, typed: Typed) -> None:
    page, call, answer = typed
    if "curl" in call and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    here = re.sub(r"(http://)?(localhost|127\.0\.0\.1):8000", server.url, call)
    here = here.replace("curl ", "curl --fail-with-body --silent --show-error ")
    here = re.sub(r"^(\.venv/bin/)?python ", f"PYTHONPATH={REPOSITORY} {sys.executable} ", here)
    if "--url" not in here and "classify" in here and "curl" not in here:
        here += f" --url {server.url}"  # so that the network is loaded only once
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", here], cwd=folder, capture_output=True, text=True, timeout=60
    )
    refusal = re.search(r'"status":(4\d\d)', answer)
    assert done.returncode == (22 if refusal else 0), f"{page}: {call}\n{done.stdout}\n{done.stderr}"
    if refusal:
        assert refusal[0] in done.stdout
    told, shown = (set(re.findall(r'"([a-z_0-9]+)":', text)) for text in (done.stdout, answer))
    assert shown <= told, f"{page}: {call}: not answered any more: {shown - told}"
    assert done.stdout.strip()


COMMANDS = [typed for typed in chosen("python -m ", ".venv/bin/python -m ") if "-m pytest" not in typed.command]

# In one process, since each of many would take seconds to import torch.
ASK_FOR_HELP = """
import contextlib, io, json, runpy, sys

found = {}
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = [*command[1:], "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
            code = None
        except SystemExit as ended:
            code = ended.code
    found[" ".join(command)] = [code, printed.getvalue()]
print(json.dumps(found))
"""


def module_and_command(command: str) -> list[str]:
    words = command.split(" -m ")[1].split()
    return words[:1] + [word for word in words[1:2] if re.fullmatch(r"[a-z]+", word)]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The `--help` of every module, and of every command of one, that the documents call."""
    asked = sorted({tuple(module_and_command(typed.command)) for typed in COMMANDS})
    process = [sys.executable, "-c", ASK_FOR_HELP, json.dumps(asked)]
    done = subprocess.run(process, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(code in (None, 0) and text for code, text in found.values()), done.stderr
    return {command: text for command, (_, text) in found.items()}


@pytest.mark.parametrize("typed", COMMANDS, ids=name_of)
def test_every_command_knows_its_options(helps: dict[str, str], typed: Typed) -> None:
    page, command, _ = typed
    known = helps[" ".join(module_and_command(command))]
    for option in re.findall(r"\s(--[a-z0-9-]+)", command):
        assert re.search(rf"{option}\b", known), f"{page}: {command}: no such option {option}"
    if "--recipe" in command:
        recipe = re.search(r"--recipe (\S+)", command)
        assert recipe
        assert (REPOSITORY / "training" / "recipes" / f"{recipe[1]}.toml").is_file()


def test_every_make_target_and_every_link_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for page, command, _ in chosen("make "):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), f"{page}: {command}"
    for page in [*PAGES, *(REPOSITORY / "models" / "zoo").glob("*/README.md")]:
        for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_of(path), f"{page.name}: {target}#{anchor}"


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub generates for a document's headings."""
    headings = re.findall(r"^#{1,6} (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_train_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bin/python", ".dev"):  # so that make installs nothing
        (tmp_path / name).touch()
    asked = ["make", "--no-print-directory", "train", "DATA=", f"VENV={tmp_path}"]  # in case make has started the tests
    done = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    images = "DATA=cifar-100-python.tar.gz (or a folder with train/ and val/)"
    assert done.stdout == f"error: no images given: make train {images}\n"


def test_every_source_file_that_is_named_exists() -> None:
    there = [
        path.relative_to(REPOSITORY).as_posix() for folder in ROOMS for path in (REPOSITORY / folder).rglob("*.py")
    ]
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+\.py)`", page.read_text()):
            assert any(path == name or path.endswith(f"/{name}") for path in there), f"{page.name}: {name}"
