"""The section ``churn`` of an experiment: what happens to peers and links while it runs.

Every factory takes the number of peers and the seed, which the program supplies, and returns a
`Script`. Times are seconds, or texts such as ``"2m"``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal

from p2pfl.churn.build import generated, load
from p2pfl.churn.outages import How
from p2pfl.churn.script import Script

Time = float | str


def none(nodes: int, seed: int) -> Script:
    """Let nothing happen."""
    return Script("churn", nodes, tuple(range(nodes)))


def script(nodes: int, seed: int, path: str) -> Script:
    """Take what happens from a churn script.

    Args:
        path: the TOML file, relative to the experiment's.
    """
    return load(path, nodes, seed)


def trace(nodes: int, seed: int, path: str, how: How = "kill") -> Script:
    """Take who is there from a recording.

    Args:
        path: a CSV file with the header ``node,start,end``, times in seconds.
        how: whether peers are killed, or take their leave.
    """
    return generated("trace", {"path": path, "how": how}, nodes, seed)


def rate(
    nodes: int,
    seed: int,
    share: str,
    mean_down: Time = 30.0,
    until: Time = 3600.0,
    how: How = "kill",
) -> Script:
    """Let a share of the peers go in every minute; they come back.

    Args:
        share: of those that are there, as ``"20% a minute"``.
        mean_down: mean time one is away.
        until: nobody goes later.
        how: whether peers are killed, or take their leave.
    """
    return _generated(nodes, seed, churn=share, mean_down=mean_down, until=until, how=how)


def sessions(  # noqa: PLR0913 - a section: every parameter is a key of the file
    nodes: int,
    seed: int,
    mean_up: Time,
    mean_down: Time = 30.0,
    up: Literal["exponential", "weibull", "pareto"] = "exponential",
    shape: float | None = None,
    until: Time = 3600.0,
    how: How = "kill",
) -> Script:
    """Let every peer come and go by itself.

    Args:
        mean_up: mean time it stays.
        mean_down: mean time it is away, which is exponential.
        up: the law of the time it stays.
        shape: of weibull, or of pareto (its alpha, above 1).
        until: nobody goes later.
        how: whether peers are killed, or take their leave.
    """
    keys = {"mean_up": mean_up, "mean_down": mean_down, "until": until, "how": how}
    return _generated(
        nodes, seed, sessions=up, **keys, **({} if shape is None else {"shape": shape})
    )


def diurnal(  # noqa: PLR0913 - a section: every parameter is a key of the file
    nodes: int,
    seed: int,
    period: Time,
    high: float = 0.9,
    low: float = 0.3,
    spread: float = 0.0,
    until: Time = 3600.0,
    how: How = "kill",
) -> Script:
    """Let the probability to be there follow a cosine, as day and night.

    Args:
        period: a day; it begins at noon.
        high: probability to be there at noon.
        low: probability to be there at midnight.
        spread: noon is later by a time drawn for each peer, up to this share of the period.
        until: nobody goes later.
        how: whether peers are killed, or take their leave.
    """
    keys: dict[str, Any] = {"high": high, "low": low, "spread": spread}
    return _generated(nodes, seed, diurnal=period, until=until, how=how, **keys)


def failures(  # noqa: PLR0913 - a section: every parameter is a key of the file
    nodes: int,
    seed: int,
    mean_between: Time,
    size: int | str,
    mean_down: Time = 30.0,
    until: Time = 3600.0,
    how: How = "kill",
) -> Script:
    """Let several peers fail at once and come back together, as when a rack loses its power.

    Args:
        mean_between: mean time between two failures.
        size: how many peers fail at once: a number, or a share as ``"25%"``.
        mean_down: mean time they are away.
        until: nobody fails later.
        how: whether peers are killed, or take their leave.
    """
    keys: dict[str, Any] = {"size": size, "mean_down": mean_down, "until": until, "how": how}
    return _generated(nodes, seed, failures=mean_between, **keys)


def _generated(nodes: int, seed: int, **keys: Any) -> Script:  # noqa: ANN401
    return generated("generate", keys, nodes, seed)


CHURN: MappingProxyType[str, Callable[..., Script]] = MappingProxyType(
    {
        "none": none,
        "script": script,
        "trace": trace,
        "rate": rate,
        "sessions": sessions,
        "diurnal": diurnal,
        "failures": failures,
    }
)
