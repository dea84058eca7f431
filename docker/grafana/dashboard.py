"""Writes the Grafana dashboard from panels.toml: `make dashboard`.

Built with the types of Grafana's foundation SDK, which rule out options that do not exist. A test checks that
dashboards/exitserve.json is up to date.
"""

import json
import tomllib
from pathlib import Path
from typing import Literal

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import prometheus, stat, text, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.text import TextMode
from pydantic import BaseModel, ConfigDict

HERE = Path(__file__).parent
PANELS = HERE / "panels.toml"
DASHBOARD = HERE / "dashboards/exitserve.json"

SOURCE = models.DataSourceRef(type_val="prometheus", uid="prometheus")
WIDTH = 24
NUMBER_HEIGHT, GRAPH_HEIGHT, ABOUT_HEIGHT = 4, 9, 5
STACKING = {"lines": "NONE", "stacked": "NORMAL"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Query(_Strict):
    expression: str
    legend: str = ""


class Panel(_Strict):
    title: str
    description: str
    queries: list[Query]
    kind: Literal["number", "lines", "stacked"] = "lines"
    unit: str = "short"
    width: int = 12
    row: str | None = None
    from_zero: bool = False
    maximum: float | None = None
    red_from: float | None = None
    red_below: float | None = None
    limits: str | None = None


class About(_Strict):
    title: str
    description: str
    text: str


class Panels(_Strict):
    about: About
    panel: list[Panel]


def build(panels: Panels) -> models.Dashboard:
    """Build the dashboard in Grafana's types."""
    dashboard = (
        dashboards.Dashboard("ExitServe")
        .uid("exitserve")
        .description("Exits, budget and latency of servers whose networks stop early.")
        .tags(["exitserve"])
        .timezone("browser")
        .refresh("5s")
        .time("now-30m", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(_choice("model", "Model", "label_values(exitserve_model_info, name)"))
        .with_variable(_choice("instance", "Server", 'label_values(exitserve_model_info{name=~"$model"}, instance)'))
        .with_variable(
            dashboards.IntervalVariable("interval")
            .label("Over")
            .values("1m,5m,15m,1h")
            .current(models.VariableOption(selected=True, text="1m", value="1m"))
        )
        .with_panel(
            text.Panel()
            .title(panels.about.title)
            .description(panels.about.description)
            .mode(TextMode.MARKDOWN)
            .content(panels.about.text)
            .span(WIDTH)
            .height(ABOUT_HEIGHT)
        )
    )
    for panel in panels.panel:
        if panel.row is not None:
            dashboard.with_row(dashboards.Row(panel.row))
        dashboard.with_panel(_number(panel) if panel.kind == "number" else _graph(panel))
    built = dashboard.build()
    for number, part in enumerate(built.panels or [], start=1):
        part.id_val = number
    return built


def _choice(name: str, label: str, query: str) -> dashboards.QueryVariable:
    return (
        dashboards.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _number(panel: Panel) -> stat.Panel:
    steps = [models.Threshold(value=None, color="green" if panel.red_below is None else "red")]
    if panel.red_below is not None:
        steps.append(models.Threshold(value=panel.red_below, color="green"))
    if panel.red_from is not None:
        steps.append(models.Threshold(value=panel.red_from, color="red"))
    return (
        stat.Panel()
        .title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .targets(_targets(panel))
        .unit(panel.unit)
        .span(panel.width)
        .height(NUMBER_HEIGHT)
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboards.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    )


def _graph(panel: Panel) -> timeseries.Panel:
    lines = panel.kind == "lines"
    graph = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .targets(_targets(panel))
        .unit(panel.unit)
        .span(panel.width)
        .height(GRAPH_HEIGHT)
        .line_width(2 if lines else 0)
        .fill_opacity(0 if lines else 70)
        .show_points(common.VisibilityMode.NEVER)
        .stacking(common_builders.StackingConfig().mode(common.StackingMode[STACKING[panel.kind]]))
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    )
    if panel.from_zero:
        graph.min(0)
    if panel.maximum is not None:
        graph.max(panel.maximum)
    if panel.limits is not None:
        dashed = models.DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 6]})
        graph.override_by_regexp(f"/{panel.limits}/", [dashed])
    return graph


def _targets(panel: Panel) -> list[Builder[Dataquery]]:
    return [
        prometheus.Dataquery()
        .ref_id(chr(ord("A") + i))
        .datasource(SOURCE)
        .expr(query.expression)
        .legend_format(query.legend)
        .range()
        for i, query in enumerate(panel.queries)
    ]


def render() -> str:
    """The dashboard as the JSON file that Grafana reads."""
    panels = Panels.model_validate(tomllib.loads(PANELS.read_text(encoding="utf-8")))
    return json.dumps(build(panels), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(render(), encoding="utf-8")
