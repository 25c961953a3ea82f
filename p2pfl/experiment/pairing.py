"""Which algorithm goes with which topology, mixing rule and pace; wrong pairs are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Needs
from p2pfl.errors import UserError
from p2pfl.experiment.sections import Rounds, Timer
from p2pfl.topology.mixing import Mixing, in_shares, link_weights, weights
from p2pfl.topology.schedule import Topology, in_degrees
from p2pfl.topology.spectral import is_doubly_stochastic

DENSE = 2000  # nodes up to which eigenvalues are worked out
ROUNDED = 1e-6  # below zero by less is no negative own weight


class Pairing(NamedTuple):
    """What has to fit together."""

    names: Mapping[str, str]  # what each section is called in the file
    needs: Needs
    carries: bool  # whether the algorithm can train while it exchanges
    topology: Topology
    mixing: Mixing
    lazy: bool  # whether the mixing rule is
    pace: Rounds | Timer
    standardise: str
    restarts: bool  # whether the algorithm can begin anew with some neighbours
    churns: bool  # whether anything happens to peers or links
    refused: bool  # whether attackers send what their receivers refuse
    loses: bool  # whether the emulated network loses messages
    reckoned: int | None  # how many rounds the algorithm reckons with, if it does


def default_mixing(needs: Needs) -> dict[str, object]:
    """Return the mixing rule which suits an algorithm best."""
    if needs.weights == "mass":
        return {"name": "push"}
    return {"name": "metropolis", "lazy": needs.positive}


def suited(mixing: Mixing, needs: Needs) -> Mixing:
    """Return a rule as an algorithm makes use of it: who adds up a mass sends shares of it."""
    splits = needs.weights == "mass" and mixing.conserves == "mean"
    return in_shares(mixing) if splits else mixing


def check_pairing(pair: Pairing) -> None:
    """Refuse what cannot work together.

    Raises:
        UserError: it names the two sections, and what would do.
    """
    _check_graph(pair)
    _check_rule(pair)
    _check_weights(pair)
    _check_pace(pair)
    _check_churn(pair)
    _check_models(pair)
    if pair.needs.positive:
        _check_spectrum(pair)


def _check_rule(pair: Pairing) -> None:
    """Refuse a rule that cannot be worked out here, or that nothing makes use of."""
    rule, links = pair.mixing, pair.topology.links(0)
    mixing, graph = _names(pair, "mixing", "topology")
    if isinstance(pair.pace, Timer) and mixing != default_mixing(pair.needs)["name"]:
        raise UserError(
            "pace.name = 'timer' merges two models half and half, and makes no use of"
            f" mixing.name = {mixing!r}: leave it out"
        )
    if rule.of_graph is None:
        return
    if links.weights is not None:
        raise UserError(
            f"topology.name = {graph!r} comes with weights of its own, and makes no use of"
            f" mixing.name = {mixing!r}: leave it out"
        )
    try:
        link_weights(links, rule)
    except ValueError as error:
        raise UserError(
            f"mixing.name = {mixing!r} on topology.name = {graph!r}: {error}"
        ) from error


def _check_weights(pair: Pairing) -> None:
    needs, rule = pair.needs.weights, pair.mixing
    name, mixing, graph = _names(pair, "algorithm", "mixing", "topology")
    if needs == "none" and pair.standardise == "pooled":
        raise UserError(
            f"preprocess.standardise = 'pooled' asks the others, but algorithm.name = {name!r}"
            " hears nobody: use standardise = 'own'"
        )
    if needs == "mean" and rule.conserves == "mass":
        raise UserError(
            f"mixing.name = {mixing!r} splits a mass (its columns sum to one), but"
            f" algorithm.name = {name!r} takes means: use metropolis or uniform,"
            " or algorithm.name = 'push_sum'"
        )
    means = needs == "mass" and rule.conserves == "mean"
    if means and not all(map(is_doubly_stochastic, _matrices(pair))):
        raise UserError(
            f"mixing.name = {mixing!r} takes means, but algorithm.name = {name!r} adds up"
            " shares of a mass: the columns of its matrix must sum to one, and those on"
            f" topology.name = {graph!r} do not: use push"
        )
    convex = pair.needs.convex or pair.needs.rule or needs == "mass"
    if convex and rule.of_graph is not None and not _is_convex(pair):
        raise UserError(
            f"mixing.name = {mixing!r} on topology.name = {graph!r} has weights that are negative,"
            f" or links of weight 0, and algorithm.name = {name!r} must not have any: use"
            " metropolis or max_degree"
        )


def _is_convex(pair: Pairing) -> bool:
    """Say whether everybody takes something of all it hears, and nothing less than 0 of itself."""
    taken = torch.cat([link_weights(links, pair.mixing) for links in pair.topology.rounds()])
    own = torch.cat([matrix.to_dense().diagonal() for matrix in _matrices(pair)])
    return bool((taken > 0).all() and (own > -ROUNDED).all())


def _matrices(pair: Pairing) -> Iterator[Tensor]:
    return (weights(links, pair.mixing) for links in pair.topology.rounds())


def _check_graph(pair: Pairing) -> None:
    needs, topology = pair.needs, pair.topology
    name, graph = _names(pair, "algorithm", "topology")
    if needs.graph == "complete" and not topology.is_complete:
        raise UserError(
            f"algorithm.name = {name!r} averages by counts, which is right only where everybody"
            f" hears everybody, and topology.name = {graph!r} is not complete: use dpsgd, or"
            " push_sum with weight = 'examples'"
        )
    if needs.graph == "symmetric" and not topology.is_symmetric:
        raise UserError(
            f"algorithm.name = {name!r} needs links that go both ways, and topology.name ="
            f" {graph!r} has others: use an undirected graph, or algorithm.name = 'push_sum'"
        )
    if needs.graph == "tree" and not topology.is_tree:
        raise UserError(
            f"algorithm.name = {name!r} passes models on along a tree, and topology.name ="
            f" {graph!r} has cycles, is in pieces or has links one way only: use chain, star,"
            " binary_tree, or a file with a spanning tree"
        )
    if needs.static and topology.period != 1:
        raise UserError(
            f"algorithm.name = {name!r} needs neighbours that stay, and topology.name ="
            f" {graph!r} changes them from round to round"
        )


def _check_pace(pair: Pairing) -> None:
    needs, pace = pair.needs, pair.pace
    if isinstance(pace, Timer):
        _check_timer(pair)
        return
    (name,) = _names(pair, "algorithm")
    if needs.every_message and pace.patience == 0:
        raise UserError(
            f"algorithm.name = {name!r} needs every message in its round: pace.patience = 0"
            " does not wait for them"
        )
    if pace.train_every > 1 and (needs.one_step or needs.rounds):
        raise UserError(
            f"algorithm.name = {name!r} asks for local steps in every round: set"
            f" pace.train_every = 1, not {pace.train_every}"
        )
    if needs.single and int(heard(pair).max()) > 1:
        raise UserError(
            f"algorithm.name = {name!r} as it is set takes one model at a time, and on"
            f" topology.name = {pair.names['topology']!r} a node hears"
            f" {int(heard(pair).max())} in a round: use pace.name = 'timer', or one neighbour in"
            " each round, as of random_matching"
        )
    if needs.one_step and pace.local_steps != 1:
        raise UserError(
            f"algorithm.name = {name!r} takes exactly one step a round: set pace.local_steps = 1"
        )
    if pace.overlap and not pair.carries:
        raise UserError(
            f"algorithm.name = {name!r} as it is set cannot train while it exchanges"
            " (pace.overlap = true): use fedavg, push_sum, gosgd, local, balance, rpel, ubar, or"
            " dpsgd with order = 'adapt_then_combine'"
        )
    if pace.stop:
        _check_stop(pair, pace.stop.metric)


def _check_stop(pair: Pairing, metric: str) -> None:
    """Refuse to stop by what is never measured, or where some never hear what others say."""
    if metric.startswith("eval") and pair.names["holdout"] == "none":
        raise UserError(
            f"pace.stop.metric = {metric!r} is never measured with holdout.name = 'none'"
        )
    try:
        pair.topology.reach()
    except ValueError as error:
        section = "algorithm" if pair.needs.weights == "none" else "topology"
        raise UserError(
            "pace.stop lets all nodes agree on a round, and with"
            f" {section}.name = {pair.names[section]!r} some never hear of others: leave it out"
        ) from error


def _check_timer(pair: Pairing) -> None:
    needs = pair.needs
    (name,) = _names(pair, "algorithm")
    if pair.topology.period != 1:
        raise UserError(
            "pace.name = 'timer' has no rounds, and topology.name ="
            f" {pair.names['topology']!r} changes from round to round: use a fixed graph"
        )
    in_step = needs.rounds or needs.every_message
    shares = needs.weights == "mass" and not pair.carries  # they are given away beside local steps
    if in_step or shares or needs.graph == "complete":
        raise UserError(
            f"algorithm.name = {name!r} works in rounds, not by pace.name = 'timer':"
            " use gossip, gosgd, dpsgd or local"
        )


def _check_models(pair: Pairing) -> None:
    """Refuse a rule that would have no effect at some node, because it hears too few."""
    needs = pair.needs
    if pair.refused and isinstance(pair.pace, Rounds) and pair.pace.patience == math.inf:
        raise UserError(
            "attackers.attack = 'non_finite': what they send is refused, and pace.patience = inf"
            " waits for it for ever: give a number of seconds"
        )
    if isinstance(pair.pace, Timer) and needs.models > 2:
        raise UserError(
            f"{needs.rule} needs {needs.models} models at once, and with pace.name = 'timer' a peer"
            " merges two: use aggregate = 'clipped_gossip:tau=...', or rounds"
        )
    if needs.models == 1:
        return
    most = heard(pair).amax(0)
    if int(most.min()) + 1 < needs.models:
        node = int(most.argmin())
        (graph,) = _names(pair, "topology")
        raise UserError(
            f"{needs.rule} needs {needs.models} models, a node's own included, and node {node} on"
            f" topology.name = {graph!r} has {int(most[node])} neighbours: reckon with fewer"
            " attackers, or use a topology of a higher degree"
        )


def heard(pair: Pairing) -> Tensor:
    """Return how many others each node hears in each round, ``[rounds, n]``."""
    return torch.stack([in_degrees(links) for links in pair.topology.rounds()])


def _check_churn(pair: Pairing) -> None:
    if pair.churns and pair.needs.every_message and not pair.restarts:
        (name,) = _names(pair, "algorithm")
        raise UserError(
            f"algorithm.name = {name!r} needs every message of every neighbour, and with churn"
            " some are lost: use dpsgd, fedavg, push_sum or gossip"
        )


def _check_spectrum(pair: Pairing) -> None:
    topology = pair.topology
    if topology.n > DENSE or pair.lazy:
        return  # a lazy matrix has no negative eigenvalues
    matrix = weights(topology.links(0), pair.mixing).to_dense()
    smallest = float(torch.linalg.eigvals(matrix).real.min())  # it need not be symmetric
    if smallest <= -1 / 3 + 1e-9:
        name, graph = _names(pair, "algorithm", "topology")
        raise UserError(
            f"algorithm.name = {name!r} diverges on topology.name = {graph!r} with these"
            f" weights: their smallest eigenvalue is {smallest:.3f}, not above -1/3;"
            ' use mixing = {name = "metropolis", lazy = true}'
        )


def _names(pair: Pairing, *sections: str) -> list[str]:
    return [pair.names[section] for section in sections]
