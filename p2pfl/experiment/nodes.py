"""How many nodes there are, and the graph they form, where a file or a command leaves it open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import networkx as nx

from p2pfl.data.dataset import Source
from p2pfl.errors import UserError
from p2pfl.experiment.config import Section, Value, read
from p2pfl.experiment.files import located
from p2pfl.experiment.sections import SECTIONS
from p2pfl.topology.files import Network
from p2pfl.topology.schedule import Topology, static

# Graphs which are mended rather than made anew when somebody goes: of those that are drawn at
# random most links would be others, and a grid of a prime number of nodes is a chain.
# Cyclon's views would be shuffled from the first round on.
MENDED = (
    "file",
    "grid",
    "random_regular",
    "erdos_renyi",
    "watts_strogatz",
    "barabasi_albert",
    "d_cliques",
    "cyclon",
)


def as_topology(drawn: nx.Graph | Network | Topology, name: str) -> Topology:
    """Return who talks to whom in every round; of a graph or a file, always the same."""
    if isinstance(drawn, Topology):
        return drawn
    return static(drawn.graph if isinstance(drawn, Network) else drawn, name)


def topology_of(spec: str, nodes: int | None) -> nx.Graph | Network | Topology:
    """Return the graph, file or schedule that ``p2pfl topology show`` is asked for.

    Raises:
        UserError: there is no such thing, or not with so many nodes.
    """
    section = read("topology", located("topology", spec, Path.cwd()), SECTIONS["topology"])
    if section.name == "file":
        return section.build("topology", nodes)
    rows, cols = section.values.get("rows"), section.values.get("cols")
    n = nodes or (rows * cols if rows and cols else None)
    if n is None:
        raise UserError(f"{spec}: say how many nodes, as in --nodes 16")
    return section.build("topology", n)


def count_nodes(nodes: Value, sections: Mapping[str, Section]) -> int:
    """Return how many nodes there are, as said or as it follows from the rest."""
    if nodes is not None:
        if type(nodes) is not int or nodes < 1:
            raise UserError(f"nodes = {nodes!r}: expected a whole number, at least 1")
        return nodes
    topology, data = sections["topology"], sections["data"]
    if topology.name == "file":
        network: Network = topology.build("topology", None)
        return len(network.names)
    rows, cols = topology.values.get("rows"), topology.values.get("cols")
    if rows and cols:
        return int(rows * cols)
    source: Source = data.build("data")
    return source.files or 8
