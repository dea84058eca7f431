"""Asks a Prometheus every question of the dashboard and tells which have no answer:
`python -m docker.grafana.ask http://localhost:9090 [INTERVAL]`.

Standard library alone, so that it runs beside any Prometheus.
"""

import argparse
import json
import math
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "dashboards/exitserve.json"


def dashboard() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return parsed


def questions(interval: str) -> Iterator[tuple[str, str]]:
    """Each panel's title with each of its queries, its variables filled in as Grafana would with everything chosen."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], fill(target["expr"], interval)


def fill(expression: str, interval: str) -> str:
    filled = expression.replace("$interval", interval).replace("$instance", ".+").replace("$model", ".+")
    if "$" in filled:
        raise ValueError(f"a variable that the dashboard does not have: {filled}")
    return filled


def ask(url: str, path: str, **parameters: str) -> Any:
    """One call of Prometheus' HTTP interface; returns its `data`."""
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=10) as response:
        return json.load(response)["data"]


def values(url: str, expression: str) -> list[float]:
    """What a query gives now: the values that are numbers."""
    found = (float(series["value"][1]) for series in ask(url, "query", query=expression)["result"])
    return [value for value in found if not math.isnan(value)]


def variable_values(url: str, name: str) -> list[str]:
    """What Grafana would offer for a variable of the dashboard."""
    [variable] = [each for each in dashboard()["templating"]["list"] if each["name"] == name]
    called = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
    if called is None:
        raise ValueError(f"not understood: {variable['query']}")
    offered: list[str] = ask(url, f"label/{called[2]}/values", **{"match[]": fill(called[1], "1m")})
    return offered


def unanswered(url: str, interval: str) -> list[str]:
    """Every question that has no answer yet, as `panel: query`."""
    empty = [f"{title}: {query}" for title, query in questions(interval) if not values(url, query)]
    return empty + [f"variable {name}" for name in ("model", "instance") if not variable_values(url, name)]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m docker.grafana.ask", description=__doc__.split(":")[0] + ".")
    parser.add_argument("url", metavar="URL", help="where Prometheus is, e.g. http://localhost:9090")
    parser.add_argument("interval", metavar="INTERVAL", nargs="?", default="1m", help="of rates (default: 1m)")
    options = parser.parse_args(arguments)
    try:
        missing = unanswered(options.url.rstrip("/"), options.interval)
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"error: {options.url} does not answer as a Prometheus does: {error}\n")
        return 2
    sys.stdout.write("\n".join(missing) + "\n" if missing else "every query has an answer\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
