"""One line for every hyper-parameter that must lie somewhere."""

from __future__ import annotations


def require(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise ValueError naming the parameter, its value and what is accepted, unless `ok`.

    >>> require(-1 >= 0, "lr", -1, "a number >= 0")
    Traceback (most recent call last):
    ValueError: lr must be a number >= 0, not -1
    """
    if not ok:
        raise ValueError(f"{name} must be {accepted}, not {value!r}")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a setting that is too small.

    Raises:
        ValueError: it names it.
    """
    if not least <= value < float("inf"):
        raise ValueError(f"{name} = {value} is not a finite number >= {least}")


def above_zero(name: str, value: float) -> None:
    """Refuse a setting that is not a finite number above zero.

    Raises:
        ValueError: it names it.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} = {value} is not a finite number above 0")
