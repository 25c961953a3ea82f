"""Decentralised algorithms: each a function which takes an optimiser and returns an `Algorithm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pfl.algorithm import Algorithm
from p2pfl.algorithms.averaging import average, dpsgd, fedavg, local
from p2pfl.algorithms.compressed import choco
from p2pfl.algorithms.corrected import d2, gradient_tracking
from p2pfl.algorithms.gossip import gossip
from p2pfl.algorithms.proximal import proximal
from p2pfl.algorithms.push_sum import push_sum
from p2pfl.algorithms.robust import balance, rpel

ALGORITHMS: dict[str, Callable[..., Algorithm[Any, Any, Any]]] = {
    "balance": balance,
    "choco": choco,
    "d2": d2,
    "dpsgd": dpsgd,
    "fedavg": fedavg,
    "gossip": gossip,
    "gradient_tracking": gradient_tracking,
    "local": local,
    "push_sum": push_sum,
    "rpel": rpel,
}

__all__ = [
    "ALGORITHMS",
    "average",
    "balance",
    "choco",
    "d2",
    "dpsgd",
    "fedavg",
    "gossip",
    "gradient_tracking",
    "local",
    "proximal",
    "push_sum",
    "rpel",
]
