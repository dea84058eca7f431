"""The page's files: served completely, with types, caching and security headers, and packed into the wheel."""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from models.bundle import load_bundle
from service.api.page import DOCS_HEADERS, HEADERS, WEB
from tests.bundles import tiny_bundle
from tests.service.apps import Http, build_app, problem, serving
from tests.service.process import REPOSITORY

FILES = sorted(path.relative_to(WEB).as_posix() for path in WEB.rglob("*") if path.is_file())
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
TOKEN = "token-of-the-test"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def http(bundle: Path) -> Iterator[Http]:
    with serving(build_app(bundle)) as http:
        yield http


def check_headers(response: httpx.Response, expected: dict[str, str] = HEADERS) -> None:
    assert {name: response.headers[name] for name in expected} == expected


def test_the_page_is_at_the_root(http: Http) -> None:
    response = http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == TYPES[".html"]
    assert response.headers["cache-control"] == "no-cache"
    assert response.content == (WEB / "index.html").read_bytes()
    check_headers(response)


def test_the_api_documentation_loads_only_files_of_this_server(http: Http) -> None:
    response = http.get("/docs")
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-cache"
    assert response.text == (WEB / "docs.html").read_text()
    assert "//" not in response.text, "names another host"
    check_headers(response, DOCS_HEADERS)
    for name in re.findall(r'(?:src|href)="([^"]+)"', response.text):
        assert http.get(f"/{name}").status_code == 200
    assert http.get("/redoc").status_code == 404


@pytest.mark.parametrize("file", FILES)
def test_every_file_has_its_type_and_is_revalidated_only_if_it_may_change(http: Http, file: str) -> None:
    response = http.get(f"/web/{file}")
    assert response.status_code == 200
    assert response.content == (WEB / file).read_bytes()
    suffix = Path(file).suffix
    assert suffix not in TYPES or response.headers["content-type"] == TYPES[suffix]
    assert ("immutable" in response.headers["cache-control"]) == file.startswith("vendor/")
    check_headers(response, DOCS_HEADERS if file == "docs.html" else HEADERS)
    again = http.get(f"/web/{file}", headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == response.headers["cache-control"]


@pytest.mark.parametrize("asked", ["bytes=0-3", "bytes=zz", "bytes=5-3", "bytes=99999999-", "lines=1-2"])
def test_files_are_sent_completely_despite_range_headers(http: Http, asked: str) -> None:
    """Starlette answers invalid ranges with text, which is not a problem document."""
    for path in ("/", "/web/index.html"):
        response = http.get(path, headers={"Range": asked})
        assert (response.status_code, response.headers["accept-ranges"]) == (200, "none")
        assert response.content == (WEB / "index.html").read_bytes()


@pytest.mark.parametrize("path", ["/", "/web/main.js"])
def test_head_equals_get_without_a_body(http: Http, path: str) -> None:
    got, head = http.get(path), http.request("HEAD", path)
    assert (head.status_code, head.content) == (200, b"")
    differing = {"date", "x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in differing} == {
        k: v for k, v in got.headers.items() if k not in differing
    }


@pytest.mark.parametrize(
    "path",
    [
        "/web/../api/app.py",
        "/web/%2e%2e/api/app.py",
        "/web/..%2fsettings.py",
        "/web/samples/%2e%2e/%2e%2e/settings.py",
        "/web/%2fetc%2fpasswd",
        "/web//etc/passwd",
        "/web/..%5csettings.py",
        "/web/%00",
        "/web/samples",
        "/web/" + "a" * 5000,
        "/web/nothing.js",
        "/index.html",
    ],
)
def test_no_other_files_can_be_reached(http: Http, path: str) -> None:
    response = http.get(path)
    assert response.status_code == 404
    assert response.json()["type"].endswith(":not-found")


@pytest.mark.parametrize("path", ["/", "/web/main.js"])
def test_files_are_read_only(http: Http, path: str) -> None:
    assert http.post(path).headers["allow"] in ("GET, HEAD", "HEAD, GET")
    problem(http.put(path), 405, "method-not-allowed")


def test_the_page_loads_exactly_the_files_that_exist() -> None:
    page = "".join((WEB / name).read_text() for name in ("index.html", "docs.html"))
    named = {name.removeprefix("web/") for name in re.findall(r'(?:src|href)="(web/[^"]+)"', page)}
    modules = [file for file in FILES if file.endswith(".js") and not file.startswith("vendor/")]
    for module in modules:
        named.update(re.findall(r'from "\./([^"]+)"', (WEB / module).read_text()))
    assert named <= set(FILES)
    assert set(modules) <= named, "a module that nothing imports"


def test_no_file_names_another_host() -> None:
    for file in FILES:
        if Path(file).suffix in (".html", ".js", ".css", ".svg") and not file.startswith("vendor/"):
            text = (WEB / file).read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
            assert not re.search(r"//[\w-]+\.\w|url\(", text.replace("// ", "")), file


def test_samples_are_files_named_after_classes_of_the_shipped_network() -> None:
    listed = re.findall(r'"(\w+)"', (WEB / "samples.js").read_text().split("]")[0])
    assert sorted(listed) == sorted(path.stem for path in (WEB / "samples").glob("*.png"))
    assert set(listed) <= set(load_bundle(REPOSITORY / "models/zoo/cifar100-msdnet").manifest.class_names)
    assert (REPOSITORY / "examples" / "images" / "fox.png").read_bytes() == (WEB / "samples" / "fox.png").read_bytes()


def test_the_vendored_libraries_are_the_published_ones() -> None:
    documented = (REPOSITORY / "docs" / "dependencies.md").read_text()
    vendored = [WEB / file for file in FILES if file.startswith("vendor/")]
    code = {"uPlot.iife.min.js", "uPlot.min.css", "swagger-ui-bundle.js", "swagger-ui.css"}
    assert {path.name for path in vendored} == code | {"LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt"}
    for path in vendored:
        if path.name in code:
            assert f"`{path.name}` {hashlib.sha256(path.read_bytes()).hexdigest()}" in documented


def test_the_page_can_query_who_may_set_the_budget(bundle: Path, http: Http) -> None:
    assert http.get("/budget/access").json() == {"may_set": True, "kind": None, "detail": None}
    problem(http.get("/budget/access?may=I"), 422, "bad-parameter")
    with serving(build_app(bundle), client=("192.0.2.7", 50_000), ready=False) as remote:
        told = remote.get("/budget/access").json()
        assert told == {
            "may_set": False,
            "kind": "not-local",
            "detail": remote.put("/budget", json={"fraction": 0.5}).json()["detail"],
        }
    with serving(build_app(bundle, admin_token=TOKEN), ready=False) as guarded:
        for token, may_set, kind in (
            (None, False, "token-required"),
            ("wrong", False, "token-required"),
            (TOKEN, True, None),
        ):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            told = guarded.get("/budget/access", headers=headers).json()
            assert (told["may_set"], told["kind"]) == (may_set, kind)


def test_the_wheel_contains_the_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "service", source / "service", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(source)],
        check=True,
        timeout=120,
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for file in FILES:
            assert archive.read(f"service/web/{file}") == (WEB / file).read_bytes()
