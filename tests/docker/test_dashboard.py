"""The dashboard: up to date, valid for Grafana's types, with descriptions."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from docker.grafana import ask
from docker.grafana.dashboard import render

GRAFANA = Path(__file__).resolve().parents[2] / "docker/grafana"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return ask.dashboard()


def test_it_is_up_to_date() -> None:
    assert ask.DASHBOARD.read_text() == render(), "run `make dashboard`"


def test_it_contains_only_what_grafanas_types_know(dashboard: dict[str, Any]) -> None:
    """The types drop unknown fields, so the round trip is the identity only if there are none."""
    register_default_plugins()
    read = Dashboard.from_json(json.loads(json.dumps(dashboard)))
    assert json.loads(json.dumps(read, cls=JSONEncoder)) == dashboard


def test_every_panel_has_a_description_and_its_own_place(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 15
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, f"{panel['title']} overlaps another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert len(panel["description"]) > 20


def test_it_can_be_filtered_by_model_server_and_interval(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["model", "instance", "interval"]
    assert variables["interval"]["query"].split(",")[0] == "1m"
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            assert "$instance" in target["expr"] or "ALERTS" in target["expr"], panel["title"]


def test_it_uses_the_provisioned_data_source(dashboard: dict[str, Any]) -> None:
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    asked = {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel.get("targets")}
    assert asked == {source["uid"]}


def test_its_provisioned_folder_is_the_mounted_one() -> None:
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/exitserve.yml").read_text())["providers"]
    compose = (GRAFANA.parents[1] / "docker-compose.yml").read_text()
    assert f"./docker/grafana/dashboards:{provider['options']['path']}:ro" in compose
    assert f"{provider['options']['path']}/{ask.DASHBOARD.name}" in compose


def test_shares_are_computed_by_queries(dashboard: dict[str, Any]) -> None:
    """Grafana's percent stacking only changes the axis: the tooltip would show 30 images/s as 3000 %."""
    for panel in dashboard["panels"]:
        custom = panel.get("fieldConfig", {}).get("defaults", {}).get("custom", {})
        assert custom.get("stacking", {}).get("mode") != "percent", panel["title"]
