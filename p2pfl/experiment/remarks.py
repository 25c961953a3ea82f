"""What a user should know beforehand of settings that are no mistake."""

from __future__ import annotations

import torch

from p2pfl.experiment.pairing import Pairing, heard
from p2pfl.experiment.sections import Timer
from p2pfl.topology.mixing import weights


def remarks(pair: Pairing) -> list[str]:
    """Return what a user should know of a pairing that is allowed."""
    return [*_unequal(pair), *_hungry(pair), *_lossy(pair), *_miscounted(pair)]


def _unequal(pair: Pairing) -> list[str]:
    needs, topology = pair.needs, pair.topology
    if needs.rule or needs.weights != "mean" or needs.graph == "complete":
        return []
    matrix = weights(topology.links(0), pair.mixing)
    spent = torch.ones(1, topology.n, dtype=matrix.dtype) @ matrix
    if float((spent - 1).abs().max()) < 1e-9:
        return []
    mixing, graph = (pair.names[section] for section in ("mixing", "topology"))
    return [
        f"with mixing.name = {mixing!r} on topology.name = {graph!r} some nodes count for more"
        " than others in what is agreed on; push_sum weighs all alike on any graph"
    ]


def _hungry(pair: Pairing) -> list[str]:
    if not pair.needs.rule or pair.needs.models == 1 or isinstance(pair.pace, Timer):
        return []
    least = int(heard(pair).min())
    if least + 1 >= pair.needs.models:
        return []
    return [
        f"{pair.needs.rule} needs {pair.needs.models} models, and in some rounds some nodes are"
        f" given {least + 1} only: they then keep their own"
    ]


def _lossy(pair: Pairing) -> list[str]:
    needs = pair.needs
    if not (pair.loses and needs.every_message) or needs.weights == "mass":  # sums make up for it
        return []
    return [
        f"algorithm.name = {pair.names['algorithm']!r} needs every message, and network.loss is"
        " above 0: what is lost in the emulator spoils what it comes to"
    ]


def _miscounted(pair: Pairing) -> list[str]:
    pace = pair.pace
    key, most = ("ticks", pace.ticks) if isinstance(pace, Timer) else ("rounds", pace.rounds)
    if pair.reckoned in (None, most):
        return []
    return [
        f"algorithm.name = {pair.names['algorithm']!r} reckons with algorithm.rounds ="
        f" {pair.reckoned}, and pace.{key} = {most}: leave algorithm.rounds out, and it is that"
    ]
