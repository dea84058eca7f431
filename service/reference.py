"""Writes every setting as a Markdown table, from the settings' own fields: `python -m service.reference` prints it."""

import sys
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from service.command_line import GROUPS, shown_default
from service.settings import NOT_ON_THE_COMMAND_LINE, Settings, flag, variable

UNITS = {
    "s": "seconds",
    "ms": "milliseconds",
    "bytes": "bytes",
    "pixels": "pixels",
    "images": "images",
    "rows": "images",
    "flight": "images",
    "mflops": "10⁶ multiply-adds",
    "lanes": "batches",
    "workers": "processes",
}

HEAD = """\
# Configuration

Every setting of `python -m service`, as an option or an environment variable; the option wins. A wrong value is refused
before anything runs, by name. The budget can be changed later ([`PUT /budget`](http.md)), nothing else can. In the
compose stack use the variables; [operations](operations.md#the-stack) lists those of the stack itself.

Written by `make configuration` from `service/settings.py`.
"""


def document() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(line for name, fields in GROUPS.items() for line in _table(name, fields))])


def _table(name: str, fields: tuple[str, ...]) -> Iterator[str]:
    yield f"## {name}\n"
    yield "| option | variable | default | allowed | unit | meaning |"
    yield "|---|---|---|---|---|---|"
    for setting in fields:
        field = Settings.model_fields[setting]
        option = "(the variable alone)" if setting in NOT_ON_THE_COMMAND_LINE else f"`{flag(setting)}`"
        default = f"`{shown_default(field)}`" if field.default is not None else "none"
        unit = UNITS.get(setting.rsplit("_", 1)[-1], "")
        yield f"| {option} | `{variable(setting)}` | {default} | {_allowed(field)} | {unit} | {field.description} |"
    yield ""


def _allowed(field: FieldInfo) -> str:
    """What values a field takes, where that is a choice or a range."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    limits = {
        name: getattr(limit, name)
        for limit in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(limit, name)
    }
    low = f"{limits['ge']:,}" if "ge" in limits else f"above {limits['gt']:,}" if "gt" in limits else ""
    high = f"{limits['le']:,}" if "le" in limits else f"below {limits['lt']:,}" if "lt" in limits else ""
    if not low and not high:
        return ""
    return f"{low} to {high}" if high else f"{low}" if low.startswith("above") else f"from {low}"


if __name__ == "__main__":
    sys.stdout.write(document())
