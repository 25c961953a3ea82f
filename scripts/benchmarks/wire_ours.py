"""What p2pfl's own links make of the jobs in `one_way.py` and `all_to_all.py`."""

from __future__ import annotations

from crowd import Measured


def ours(params: int, secure: bool) -> Measured | None:
    """Return what one model, one way, has come to; None: not measured."""
    return None


def ours_all_to_all(processes: int, params: int, secure: bool) -> Measured | None:
    """Return what a round of all to all has come to; None: not measured."""
    return None
