"""The values in a churn script: times, shares, who is meant. Mistakes are a `ValueError`."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

Clock = Literal["time", "round"]
Value = Any  # what TOML holds

LONGEST = 1e9  # seconds, some thirty years
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PERIODS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_NUMBER = r"(\d+(?:\.\d*)?)"
_ROUND = r"(\d{1,9})"


class Selection(NamedTuple):
    """Who is meant: those named, or so many that are drawn, or (both None) all that can."""

    named: tuple[int, ...] | None = None
    number: int | None = None


def duration(value: Value) -> float:
    """Return seconds; a number is seconds already.

    >>> duration("500ms"), duration("2m"), duration(1.5)
    (0.5, 120.0, 1.5)
    """
    if isinstance(value, str):
        found = re.fullmatch(rf"{_NUMBER}\s*(ms|s|m|h|d)", value.strip())
        seconds = float(found[1]) * _UNITS[found[2]] if found else -1.0
    else:
        seconds = float(value) if type(value) in (int, float) else -1.0
    if 0 <= seconds <= LONGEST:
        return seconds
    raise ValueError(f"{value!r} is no time; expected one as '500ms', '30s', '2m' or '1h'")


def lasting(value: Value) -> float:
    """Return seconds above 0."""
    seconds = duration(value)
    if not seconds > 0:
        raise ValueError(f"{value!r} is not above 0")
    return seconds


def moment(value: Value) -> tuple[Clock, float]:
    """Return by which clock, and when.

    >>> moment("round 12"), moment("30s")
    (('round', 12), ('time', 30.0))
    """
    if isinstance(value, str) and (found := re.fullmatch(rf"round\s+{_ROUND}", value.strip())):
        return "round", int(found[1])
    try:
        return "time", duration(value)
    except ValueError as error:
        raise ValueError(f"{error}, or a round as 'round 12'") from None


def span(value: Value) -> tuple[Clock, float]:
    """Return by which clock, and how long.

    >>> span("3 rounds"), span("30s")
    (('round', 3), ('time', 30.0))
    """
    if isinstance(value, str) and (found := re.fullmatch(rf"{_ROUND}\s+rounds?", value.strip())):
        if found[1].strip("0"):
            return "round", int(found[1])
        raise ValueError(f"{value!r} is not above 0")
    return "time", lasting(value)


def share(value: Value) -> float:
    """Return a share in [0, 1], written as a percentage or as a number.

    >>> share("25%"), share(0.1)
    (0.25, 0.1)
    """
    if isinstance(value, str) and (found := re.fullmatch(rf"{_NUMBER}\s*%", value.strip())):
        number = float(found[1]) / 100
    elif type(value) in (int, float):
        number = float(value)
    else:
        raise ValueError(f"{value!r} is no share; expected one as '25%' or 0.25")
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} is not between 0 and 1 (100 %)")
    return number


def rate(value: Value) -> float:
    """Return the share in a second.

    >>> round(rate("30% a minute"), 6)
    0.005
    """
    if isinstance(value, str):
        found = re.fullmatch(r"(\S+\s*%)\s+(?:a|an|per)\s+(\w+)", value.strip())
        if found and found[2] in _PERIODS and (part := share(found[1])) > 0:
            return part / _PERIODS[found[2]]
    raise ValueError(f"{value!r} is no rate; expected one as '20% a minute' (second, hour, day)")


def how_many(value: Value, n: int) -> int:
    """Return how many of n peers a number or a share is, at least one.

    >>> how_many("25%", 10), how_many(3, 10)
    (2, 3)
    """
    if isinstance(value, str):
        if (part := share(value)) > 0:
            return max(1, round(part * n))
    elif type(value) is int and 0 < value <= n:
        return value
    raise ValueError(f"{value!r} of {n} peers cannot be; expected a number of them, or '25%'")


def selection(value: Value, n: int) -> Selection:
    """Return who of n peers is meant.

    >>> selection([1, 2], 4), selection("25%", 8), selection("all", 4), selection("5-7", 8)[0]
    ... # doctest: +NORMALIZE_WHITESPACE
    (Selection(named=(1, 2), number=None), Selection(named=None, number=2),
     Selection(named=None, number=None), (5, 6, 7))
    """
    if isinstance(value, int | list):
        return Selection(ids(value, n))
    text = value.strip() if isinstance(value, str) else ""
    if text == "all":
        return Selection()
    if text.endswith("%"):
        return Selection(number=how_many(text, n))
    if found := re.fullmatch(r"random\s+(\d+)", text):
        return Selection(number=how_many(int(found[1]), n))
    if re.fullmatch(r"\d+\s*-\s*\d+", text):
        return Selection(ids(text, n))
    raise ValueError(
        f"{value!r} names nobody; expected an id, a list of them, '4-7', 'random 2', '25%' or 'all'"
    )


def ids(value: Value, n: int) -> tuple[int, ...]:
    """Return the nodes that are named, sorted."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+)\s*-\s*(\d+)", value.strip())):
        first, last = _node(int(found[1]), n), _node(int(found[2]), n)
        if first > last:
            raise ValueError(f"{value!r} goes backwards")
        return tuple(range(first, last + 1))
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise ValueError("[] names nobody")
    nodes = [_node(one, n) for one in listed]
    if twice := [node for node, count in Counter(nodes).items() if count > 1]:
        raise ValueError(f"node {twice[0]} is named twice")
    return tuple(sorted(nodes))


def links(value: Value, n: int) -> tuple[tuple[int, int], ...] | None:
    """Return directed links ``(from, to)``; None for ``"all"``."""
    if value == "all":
        return None
    if not isinstance(value, list) or not value:
        raise ValueError(f"links = {value!r}: expected 'all' or pairs as [[0, 1], [1, 0]]")
    found: dict[tuple[int, int], None] = {}
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"link {pair!r}: expected a pair as [0, 1], from and to")
        ends = (_node(pair[0], n), _node(pair[1], n))
        if ends[0] == ends[1] or ends in found:
            raise ValueError(f"link {pair!r} {'is listed twice' if ends in found else 'is none'}")
        found[ends] = None
    return tuple(found)


def check_keys(table: Mapping[str, Value], known: Iterable[str], of: str) -> None:
    """Refuse a key that is not known, and say what would do."""
    choices = list(known)
    for key in table:
        if key not in choices:
            near = difflib.get_close_matches(key, choices, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{key} is unknown; {hint}{of} takes: {', '.join(choices)}")


def _node(value: Value, n: int) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no node; expected a number from 0 to {n - 1}")
    if not 0 <= value < n:
        raise ValueError(f"node {value} is unknown; there are {n}: 0 to {n - 1}")
    return value
