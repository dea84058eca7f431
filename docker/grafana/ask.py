"""Runs every query of the dashboard on a Prometheus and lists those without data:
`python -m docker.grafana.ask http://localhost:9090 [INTERVAL]`.

Uses only the standard library, so that it runs on any host.
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
    """Pairs of panel title and query, with variables filled in as Grafana does when everything is selected."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], fill(target["expr"], interval)


def fill(expression: str, interval: str) -> str:
    filled = expression.replace("$interval", interval).replace("$instance", ".+").replace("$model", ".+")
    if "$" in filled:
        raise ValueError(f"unknown dashboard variable in {filled}")
    return filled


def ask(url: str, path: str, **parameters: str) -> Any:
    """Call Prometheus' HTTP API; returns the `data` of its answer."""
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=10) as response:
        return json.load(response)["data"]


def values(url: str, expression: str) -> list[float]:
    """The current values of a query, without NaN."""
    found = (float(series["value"][1]) for series in ask(url, "query", query=expression)["result"])
    return [value for value in found if not math.isnan(value)]


def variable_values(url: str, name: str) -> list[str]:
    """The values that Grafana offers for a variable of the dashboard."""
    [variable] = [each for each in dashboard()["templating"]["list"] if each["name"] == name]
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
    if match is None:
        raise ValueError(f"not a label_values(METRIC, LABEL) query: {variable['query']}")
    offered: list[str] = ask(url, f"label/{match[2]}/values", **{"match[]": fill(match[1], "1m")})
    return offered


def unanswered(url: str, interval: str) -> list[str]:
    """Queries without data, as `panel: query`, and variables without values."""
    empty = [f"{title}: {query}" for title, query in questions(interval) if not values(url, query)]
    return empty + [f"variable {name}" for name in ("model", "instance") if not variable_values(url, name)]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m docker.grafana.ask", description=__doc__.split(":")[0] + ".")
    parser.add_argument("url", metavar="URL", help="Prometheus' address, e.g. http://localhost:9090")
    parser.add_argument("interval", metavar="INTERVAL", nargs="?", default="1m", help="window of rates (default: 1m)")
    options = parser.parse_args(arguments)
    try:
        missing = unanswered(options.url.rstrip("/"), options.interval)
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"error: {options.url} does not answer like a Prometheus: {error}\n")
        return 2
    sys.stdout.write("\n".join(missing) + "\n" if missing else "every query returns data\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
