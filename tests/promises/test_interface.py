"""Promise 6: every response to any request is one of those in the OpenAPI document, and none is a server error.

Schemathesis reads the document from a real server and sends valid and invalid requests, with all its checks enabled.
The few of a usual run are always the same; EXITSERVE_EXAMPLES=1000 draws that many per call at random.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.service.process import REPOSITORY, environment, running_server

HERE = Path(__file__).parent
RUN = "import sys, schemathesis.cli; sys.exit(schemathesis.cli.schemathesis())"


def test_every_response_is_documented(bundle_path: Path, tmp_path: Path) -> None:
    n_examples = int(os.environ.get("EXITSERVE_EXAMPLES", "0"))
    options = ["--checks", "all", "--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-color"]
    options += ["--max-examples", str(n_examples or 4), *(() if n_examples else ("--seed", "1"))]
    options += ["--generation-database", "none"]
    with running_server(bundle_path, tmp_path / "log", "--device", "cpu") as server:
        document = server.url + "/openapi.json"
        done = subprocess.run(
            [sys.executable, "-c", RUN, "--config-file", str(HERE / "schemathesis.toml"), "run", document, *options],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(REPOSITORY), SCHEMATHESIS_HOOKS="tests.promises.requesting"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
        assert "No issues found" in done.stdout
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
