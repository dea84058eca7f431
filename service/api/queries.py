"""Parses query strings. Unknown parameters are refused, so that a misspelt one is not silently ignored."""

import math
import re
from collections.abc import Collection
from urllib.parse import parse_qsl

from service.api.problems import Problem

# Numbers as programming languages print them: doubles have 17 digits and exponents of up to three.
NUMBER = re.compile(r"([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})([eE][+-]?[0-9]{1,3})?")


def read_query(query_string: bytes, known: Collection[str]) -> dict[str, str]:
    """Return the parameters of a query string.

    Raises:
        Problem: 422 if a parameter is not in `known` or is repeated; it lists the known ones.
    """
    if not query_string:
        return {}
    pairs = parse_qsl(query_string.decode("ascii", "replace"), keep_blank_values=True)
    values = dict(pairs)
    unknown = values.keys() - set(known)
    if unknown:
        raise bad_parameter(f"{', '.join(sorted(unknown))[:200]} is not known", known)
    if len(values) < len(pairs):
        raise bad_parameter("A parameter is given twice", known)
    return values


def integer(name: str, text: str, lowest: int, highest: int, known: Collection[str]) -> int:
    """Return the value of the parameter `name`.

    Raises:
        Problem: 422 if `text` is not an integer from `lowest` to `highest`.
    """
    if len(text) <= 9 and text.isascii() and text.isdigit() and lowest <= int(text) <= highest:
        return int(text)
    raise bad_parameter(f"{name} is {text[:40]!r} but must be an integer from {lowest} to {highest}", known)


def number(name: str, text: str, lowest: float, highest: float, known: Collection[str]) -> float:
    """Return the value of the parameter `name`.

    Raises:
        Problem: 422 if `text` is not a decimal number from `lowest` to `highest`.
    """
    if NUMBER.fullmatch(text) and lowest <= float(text) <= highest:
        return float(text)
    upwards = "" if math.isinf(highest) else f" to {highest:.10g}"
    kind = "a number of at least" if math.isinf(highest) else "a number from"
    raise bad_parameter(f"{name} is {text[:40]!r} but must be {kind} {lowest:.10g}{upwards}", known)


def bad_parameter(what: str, known: Collection[str]) -> Problem:
    names = list(known)
    listed = f"Known parameters: {', '.join(names)}." if names else "This call takes no parameters."
    return Problem(422, "bad-parameter", "Bad query parameter", f"{what}. {listed}", known=names)
