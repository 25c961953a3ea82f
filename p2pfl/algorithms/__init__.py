"""Decentralised algorithms: each a function which takes an optimiser and returns an `Algorithm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pfl.algorithm import Algorithm
from p2pfl.algorithms.accelerated import chebyshev
from p2pfl.algorithms.averaging import average, dpsgd, fedavg, local
from p2pfl.algorithms.beer import beer
from p2pfl.algorithms.compressed import choco, deepsqueeze, quantised
from p2pfl.algorithms.corrected import d2, exact_diffusion, extra, gradient_tracking, kgt
from p2pfl.algorithms.directed import push_diging, push_pull
from p2pfl.algorithms.divshare import divshare
from p2pfl.algorithms.gossip import fedasync, gossip
from p2pfl.algorithms.jwins import jwins
from p2pfl.algorithms.momentum import qg
from p2pfl.algorithms.moniqua import moniqua
from p2pfl.algorithms.outer import diloco, fedadagrad, fedadam, fedavgm, fedyogi, noloco
from p2pfl.algorithms.partial import check_partial, partial, shared_columns
from p2pfl.algorithms.powergossip import powergossip
from p2pfl.algorithms.proximal import proximal
from p2pfl.algorithms.push_sum import gosgd, push_sum
from p2pfl.algorithms.relay import relay
from p2pfl.algorithms.robust import balance, rpel
from p2pfl.algorithms.ubar import ubar
from p2pfl.algorithms.weighed import follows_scale, weighed

ALGORITHMS: dict[str, Callable[..., Algorithm[Any, Any, Any]]] = {
    "balance": balance,
    "beer": beer,
    "chebyshev": chebyshev,
    "choco": choco,
    "d2": d2,
    "deepsqueeze": deepsqueeze,
    "diloco": diloco,
    "divshare": divshare,
    "dpsgd": dpsgd,
    "exact_diffusion": exact_diffusion,
    "extra": extra,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedasync": fedasync,
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedyogi": fedyogi,
    "gosgd": gosgd,
    "gossip": gossip,
    "gradient_tracking": gradient_tracking,
    "jwins": jwins,
    "kgt": kgt,
    "local": local,
    "moniqua": moniqua,
    "noloco": noloco,
    "powergossip": powergossip,
    "push_diging": push_diging,
    "push_pull": push_pull,
    "push_sum": push_sum,
    "qg": qg,
    "quantised": quantised,
    "relay": relay,
    "rpel": rpel,
    "ubar": ubar,
}

__all__ = [
    "ALGORITHMS",
    "average",
    "balance",
    "beer",
    "chebyshev",
    "check_partial",
    "choco",
    "d2",
    "deepsqueeze",
    "diloco",
    "divshare",
    "dpsgd",
    "exact_diffusion",
    "extra",
    "fedadagrad",
    "fedadam",
    "fedasync",
    "fedavg",
    "fedavgm",
    "fedyogi",
    "follows_scale",
    "gosgd",
    "gossip",
    "gradient_tracking",
    "jwins",
    "kgt",
    "local",
    "moniqua",
    "noloco",
    "partial",
    "powergossip",
    "proximal",
    "push_diging",
    "push_pull",
    "push_sum",
    "qg",
    "quantised",
    "relay",
    "rpel",
    "shared_columns",
    "ubar",
    "weighed",
]
