"""Whether methods against attackers reckon with as many as an experiment has."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from p2pfl.algorithms.ubar import EXACT
from p2pfl.errors import UserError
from p2pfl.experiment.config import Section
from p2pfl.topology.schedule import Topology, in_degrees


def check_epidemic(sections: Mapping[str, Section], nodes: int, attackers: int) -> None:
    """Refuse `rpel` where nodes hear others than it reckons with, or more attack than that.

    Raises:
        UserError: it says what would do.
    """
    algorithm, topology = sections["algorithm"], sections["topology"]
    if algorithm.name != "rpel":
        return
    told, s = algorithm.values["nodes"], algorithm.values["s"]
    if told != nodes:
        raise UserError(f"algorithm.nodes = {told}, but nodes = {nodes}")
    if attackers > algorithm.values["attackers"]:
        raise UserError(
            f"algorithm.attackers = {algorithm.values['attackers']}, but the section attackers"
            f" has {attackers}"
        )
    pulls = topology.name == "el_local" and topology.values["pull"]
    if not pulls or topology.values["s"] != s:
        raise UserError(
            f"algorithm.name = 'rpel' reckons with nodes that hear s = {s} others, drawn in every"
            f" round: use topology = {{name = 'el_local', s = {s}, pull = true}}"
        )


def check_judged(
    section: Section, topology: Topology, attackers: Collection[int], nodes: int
) -> None:
    """Refuse `ubar` where a node keeps more models than it has honest neighbours.

    Raises:
        UserError: it names the node.
    """
    if section.name != "ubar":
        return
    lies = torch.zeros(nodes, dtype=torch.int64)
    lies[list(attackers)] = 1
    for links in topology.rounds():
        heard = in_degrees(links)
        lying = torch.zeros_like(lies).index_add_(0, links.receivers, lies[links.senders])
        kept = (heard * section.values["rho"] + EXACT).long()
        short = ((kept > heard - lying) & (lies == 0)).nonzero()
        if len(short):
            node = int(short[0])
            raise UserError(
                f"algorithm.rho = {section.values['rho']} keeps {int(kept[node])} of the"
                f" {int(heard[node])} models that node {node} hears, and"
                f" {int(lying[node])} of them attack: lower it"
            )
