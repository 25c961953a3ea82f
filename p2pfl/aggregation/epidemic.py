"""How many attackers a peer meets that hears a few others, drawn anew in every round."""

from __future__ import annotations

from math import comb


def b_hat(nodes: int, attackers: int, s: int, rounds: int, failure: float = 0.01) -> int:
    """Return how many attackers among s drawn peers are exceeded almost never.

    The least number that no honest node meets more of in any round, but with a probability of
    `failure` at most: the tail of the hypergeometric distribution, for all honest nodes and all
    rounds (El Mrini, Farhadkhani and Guerraoui 2025, arXiv 2510.08311).

    >>> b_hat(nodes=30, attackers=6, s=15, rounds=200)
    6

    Raises:
        ValueError: there are not so many others, or not one honest node.
    """
    if not 0 <= attackers < nodes:
        raise ValueError(f"attackers = {attackers} is not from 0 to {nodes - 1}")
    if not 1 <= s <= nodes - 1:
        raise ValueError(f"s = {s} must be 1 to nodes - 1 = {nodes - 1}")
    if not 0 < failure < 1:
        raise ValueError(f"failure = {failure} is not between 0 and 1")
    if rounds < 1:
        raise ValueError(f"rounds = {rounds} is below 1")
    draws, honest = comb(nodes - 1, s), nodes - 1 - attackers
    below = 0
    for met in range(min(attackers, s) + 1):
        below += comb(attackers, met) * comb(honest, s - met)
        if (below / draws) ** ((honest + 1) * rounds) >= 1 - failure:
            return met
    raise AssertionError("the whole distribution has been summed up")
