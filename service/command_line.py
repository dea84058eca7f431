"""Settings from the command line and the environment: options, their help, and error messages."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NoReturn, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from service.settings import ENV_PREFIX, NOT_ON_THE_COMMAND_LINE, Settings, SettingsError, flag, variable

PACKAGE = "exitserve"
COMMANDS = ("serve", "classify", "plan")
GROUPS = {  # all settings, in the order of `Settings`; used for `--help` and docs/configuration.md
    "Bundle and address": ("bundle", "host", "port"),
    "Budget at start-up": ("budget_fraction", "budget_mflops", "budget_accuracy", "latency_ms", "burst_images"),
    "Compute and queues": (
        "runner",
        "device",
        "compile_stages",
        "resize",
        "precision",
        "lanes",
        "max_batch_rows",
        "scheduling_policy",
        "max_in_flight",
        "max_queue_s",
    ),
    "Requests": (
        "http_workers",
        "max_body_bytes",
        "max_held_bytes",
        "max_batch_images",
        "max_pixels",
        "body_timeout_s",
        "keep_alive_s",
        "drain_s",
    ),
    "Access and logs": ("allow_origins", "admin_token", "admin_token_file", "log_level", "access_log"),
}


def load_settings(arguments: Sequence[str]) -> Settings:
    """Read the settings from command line `arguments` and the environment.

    Raises:
        SettingsError: a value is invalid; the message names the setting, the value and what is allowed.
        SystemExit: from argparse, for `--help` and `--version` (0) and unknown options (2).
    """
    if list(arguments[:1]) == ["serve"]:
        arguments = arguments[1:]
    parser = command_line()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse_unknown(parser, unknown)
    try:
        return Settings(**vars(given))
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(dict(detail)) for detail in error.errors())) from None


def _explain(detail: dict[str, object]) -> str:
    message = str(detail["msg"]).removeprefix("Value error, ")
    location = detail["loc"]
    if not isinstance(location, tuple) or not location:
        return message
    name = str(location[0])
    value = "" if name in NOT_ON_THE_COMMAND_LINE else f" {detail['input']!r}"
    names = variable(name) if name in NOT_ON_THE_COMMAND_LINE else f"{flag(name)} ({variable(name)})"
    help_text = Settings.model_fields[name].description
    return f"{names}{value}: {message[0].lower()}{message[1:]}. Meaning: {help_text}."


def _refuse_unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> NoReturn:
    if late := next((word for word in words if word in COMMANDS), None):
        parser.error(
            f"{late!r} must come first, before any option: {parser.prog} {late} ...   ({late} --help lists its own)"
        )
    word = words[0].partition("=")[0]
    if not word.startswith("-"):
        parser.error(
            f"{word!r} is neither a command ({', '.join(COMMANDS)}) nor an option: --bundle {word} serves a bundle"
        )
    near = _near(word, (flag(name) for name in Settings.model_fields if name not in NOT_ON_THE_COMMAND_LINE))
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all options"
    parser.error(f"there is no option {word}: {hint}")


def mistaken_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """Return a warning for each variable that looks like a misspelt setting, which would be ignored silently."""
    known = {variable(name) for name in Settings.model_fields}
    for name in environment:
        near = _near(name, known) if name.startswith(ENV_PREFIX) and name not in known else ()
        if near:
            yield f"{name} is not a setting and changes nothing: did you mean {' or '.join(near)}?"


def _near(word: str, known: Iterable[str]) -> list[str]:
    """Names that begin with `word` or else are similar to it, compared without `ENV_PREFIX`."""
    short = {name.removeprefix(ENV_PREFIX): name for name in sorted(known)}
    word = word.removeprefix(ENV_PREFIX)
    begin = [name for name in short if word.strip("-") and name.startswith(word)]
    return [short[name] for name in begin or get_close_matches(word, short, cutoff=0.75)]


def command_line() -> argparse.ArgumentParser:
    """The command line, generated from the fields of `Settings` so that help and behaviour cannot differ."""
    parser = argparse.ArgumentParser(
        prog="python -m service",
        usage="python -m service [serve] [--SETTING VALUE ...]   (--help lists the settings)",
        description="Serve a bundle of early-exit stages over HTTP, at the average compute per image you set.",
        epilog=(
            "Examples:\n"
            "  python -m service --budget-fraction 0.4\n"
            "  python -m service serve --bundle models/zoo/cifar100-msdnet --host 0.0.0.0 --port 8080\n"
            "  python -m service classify photo.jpg --url http://127.0.0.1:8000   (classify --help)\n"
            "  python -m service plan --rate 2000 --budget 40%   (plan --help)\n"
            "  curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/classify\n\n"
            f"Only as an environment variable: {variable('admin_token')}, the "
            f"{Settings.model_fields['admin_token'].description}."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version(), help="show program's name and version")
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name not in NOT_ON_THE_COMMAND_LINE:
                _add_option(group, name)
    return parser


def _version() -> str:
    try:
        return f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:
        return f"{PACKAGE}, version unknown: the package is not installed"


def _add_option(group: "argparse._ArgumentGroup", name: str) -> None:
    field = Settings.model_fields[name]
    text = f"{field.description} (default: {shown_default(field)}; {variable(name)})".replace("%", "%%")
    if field.annotation is bool:
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
        return
    is_choice = get_origin(field.annotation) is Literal
    value = f"{{{','.join(get_args(field.annotation))}}}" if is_choice else name.rsplit("_", 1)[-1].upper()
    group.add_argument(flag(name), metavar={"S": "SECONDS", "FLIGHT": "IMAGES"}.get(value, value), help=text)


def shown_default(field: FieldInfo) -> str:
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return str(field.default)
