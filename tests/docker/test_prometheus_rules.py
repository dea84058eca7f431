"""Prometheus' own tool checks the configuration and runs the rules' unit tests."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "docker/prometheus"
ALERTS = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)"
)


def promtool(*arguments: str) -> str:
    told = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


@needs_promtool
def test_the_configuration_is_valid() -> None:
    assert "2 rule files found" in promtool("check", "config", "--lint=all", "--lint-fatal", "prometheus.yml")


@needs_promtool
def test_the_rules_pass_their_unit_tests() -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")


def test_every_rule_has_a_unit_test() -> None:
    tested = (FOLDER / "rules_test.yml").read_text()
    told = [case for test in yaml.safe_load(tested)["tests"] for case in test.get("alert_rule_test", ())]
    for alert in ALERTS:
        expected = [case["exp_alerts"] for case in told if case["alertname"] == alert["alert"]]
        assert [] in expected, f"{alert['alert']}: no test of when it does not fire"
        assert any(expected), f"{alert['alert']}: no test of when it fires"
    for name in re.findall(r"- record: (\S+)", (FOLDER / "recording.yml").read_text()):
        assert name in tested


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_has_a_runbook(alert: dict[str, dict[str, str]]) -> None:
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (REPOSITORY / page).read_text(), flags=re.M)
    assert anchor in {heading.lower() for heading in headings}
