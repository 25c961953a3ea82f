"""The section ``attackers``: who attacks the others, and how."""

from __future__ import annotations

from typing import NamedTuple

import torch

from p2pfl import rng
from p2pfl.attacks import ATTACKS, Attack

_ATTACKERS = 17  # tells the lots of who attacks from other lots below the same keys


class Attackers(NamedTuple):
    """Who attacks, and how; see `attackers`."""

    who: tuple[int, ...]  # ascending
    attack: Attack | None  # None: nobody does


def attackers(
    n: int,
    seed: int,
    attack: Attack | None = None,
    fraction: float | None = None,
    nodes: list[int] | None = None,
) -> Attackers:
    """Let some of the nodes attack the others; by default none does.

    What a run reports is then of the others: accuracies, consensus distance, the mean model.

    Args:
        n: how many nodes there are.
        seed: draws who it is.
        attack: what they do.
        fraction: this share of all nodes, rounded, drawn by the seed of the experiment; or
        nodes: these.
    """
    if attack is None:
        if fraction is not None or nodes is not None:
            raise ValueError(f"attack is missing; choices: {', '.join(ATTACKS)}")
        return Attackers((), None)
    if (fraction is None) == (nodes is None):
        raise ValueError("give either fraction (a share of the nodes) or nodes (a list of ids)")
    if nodes is None:
        assert fraction is not None
        if not 0 < fraction < 1 or not round(fraction * n):
            raise ValueError(f"fraction = {fraction} of {n} nodes is nobody, or more than all")
        lots = rng.uniform(rng.fold(rng.keys(seed, torch.arange(n)), _ATTACKERS), 1).squeeze(1)
        nodes = lots.argsort()[: round(fraction * n)].tolist()
    who = tuple(sorted(set(nodes)))
    if not who or not 0 <= who[0] <= who[-1] < n:
        raise ValueError(f"nodes = {nodes} are not among the nodes 0 to {n - 1}")
    if len(who) == n:
        raise ValueError(f"all {n} nodes would be attackers: there is nobody left to learn")
    return Attackers(who, attack)
