"""One example of every algorithm: what must be given to those that cannot do without."""

from __future__ import annotations

import inspect
from typing import Any

from p2pfl.algorithm import Algorithm
from p2pfl.algorithms import ALGORITHMS
from p2pfl.codec import Codec, top_k
from p2pfl.learning.judging import unjudged
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.spec import Spec

ARGUMENTS: dict[str, dict[str, Any]] = {
    **{name: {"codec": "top_k:k=2"} for name in ("beer", "choco", "deepsqueeze", "quantised")},
    "balance": {"rounds": 9},
    "chebyshev": {"rho": 0.9},
    "jwins": {"k": 2},
    "moniqua": {"theta": 1.0},
    "rpel": {"nodes": 16, "attackers": 1, "s": 8, "rounds": 9},
}

# What an experiment tells those that ask for it: of six nodes, and a model of six parameters.
TOLD: dict[str, Any] = {  # what an experiment tells those that ask for it
    "n": 6,
    "spec": Spec(("weight", "bias"), ((2, 2), (2,)), ("float32", "float32")),
    "judge": unjudged,
}


def example(name: str, opt: Optimiser, codec: Codec[Any] | None = None) -> Algorithm[Any, Any, Any]:
    """Return the algorithm of that name, with that codec or the two largest entries."""
    given = ARGUMENTS.get(name, {})
    coded = {"codec": codec or top_k(2)} if "codec" in given else {}
    asked = inspect.signature(ALGORITHMS[name]).parameters
    told = {key: value for key, value in TOLD.items() if key in asked}
    return ALGORITHMS[name](opt, **(given | coded | told))
