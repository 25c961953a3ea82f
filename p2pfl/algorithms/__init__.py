"""Decentralised algorithms: each a function which takes an optimiser and returns an `Algorithm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pfl.algorithm import Algorithm
from p2pfl.algorithms.averaging import average, dpsgd, fedavg, local
from p2pfl.algorithms.beer import beer
from p2pfl.algorithms.compressed import choco, deepsqueeze, quantised
from p2pfl.algorithms.corrected import d2, gradient_tracking
from p2pfl.algorithms.gossip import gossip
from p2pfl.algorithms.jwins import jwins
from p2pfl.algorithms.moniqua import moniqua
from p2pfl.algorithms.proximal import proximal
from p2pfl.algorithms.push_sum import push_sum

ALGORITHMS: dict[str, Callable[..., Algorithm[Any, Any, Any]]] = {
    "beer": beer,
    "choco": choco,
    "d2": d2,
    "deepsqueeze": deepsqueeze,
    "dpsgd": dpsgd,
    "fedavg": fedavg,
    "gossip": gossip,
    "gradient_tracking": gradient_tracking,
    "jwins": jwins,
    "local": local,
    "moniqua": moniqua,
    "push_sum": push_sum,
    "quantised": quantised,
}

__all__ = [
    "ALGORITHMS",
    "average",
    "beer",
    "choco",
    "d2",
    "deepsqueeze",
    "dpsgd",
    "fedavg",
    "gossip",
    "gradient_tracking",
    "jwins",
    "local",
    "moniqua",
    "proximal",
    "push_sum",
    "quantised",
]
