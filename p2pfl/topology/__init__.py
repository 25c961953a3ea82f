"""Who talks to whom, and how much they make of it: graphs, schedules, weights, network files."""

from __future__ import annotations

from p2pfl.topology.chebyshev import accelerated
from p2pfl.topology.cliques import d_cliques_graph
from p2pfl.topology.draw import draw
from p2pfl.topology.epidemic import el_local, el_oracle
from p2pfl.topology.equitopo import equi_static, od_equi_dyn, ou_equi_dyn, u_equi_static
from p2pfl.topology.files import Link, Network, read_network
from p2pfl.topology.finite import base, hyper_hypercube, one_peer_hypercube, simple_base
from p2pfl.topology.graphs import (
    GRAPHS,
    barabasi_albert_graph,
    binary_tree_graph,
    chain_graph,
    complete_graph,
    erdos_renyi_graph,
    exponential_graph,
    grid_graph,
    hypercube_graph,
    random_regular_graph,
    ring_graph,
    star_graph,
    torus_graph,
    watts_strogatz_graph,
)
from p2pfl.topology.mixing import (
    MIXING,
    Mixing,
    best_constant,
    fastest,
    in_shares,
    max_degree,
    metropolis,
    push,
    uniform,
    weights,
)
from p2pfl.topology.sampling import cyclon
from p2pfl.topology.schedule import (
    Links,
    Topology,
    in_degrees,
    links_between,
    out_degrees,
    static,
)
from p2pfl.topology.spectral import Analysis, analyse, rounds_to
from p2pfl.topology.varying import (
    SCHEDULES,
    one_factorisation,
    one_peer_exponential,
    random_matching,
)

__all__ = [
    "GRAPHS",
    "MIXING",
    "SCHEDULES",
    "Analysis",
    "Link",
    "Links",
    "Mixing",
    "Network",
    "Topology",
    "accelerated",
    "analyse",
    "barabasi_albert_graph",
    "base",
    "best_constant",
    "binary_tree_graph",
    "chain_graph",
    "complete_graph",
    "cyclon",
    "d_cliques_graph",
    "draw",
    "el_local",
    "el_oracle",
    "equi_static",
    "erdos_renyi_graph",
    "exponential_graph",
    "fastest",
    "grid_graph",
    "hyper_hypercube",
    "hypercube_graph",
    "in_degrees",
    "in_shares",
    "links_between",
    "max_degree",
    "metropolis",
    "od_equi_dyn",
    "one_factorisation",
    "one_peer_exponential",
    "one_peer_hypercube",
    "ou_equi_dyn",
    "out_degrees",
    "push",
    "random_matching",
    "random_regular_graph",
    "read_network",
    "ring_graph",
    "rounds_to",
    "simple_base",
    "star_graph",
    "static",
    "torus_graph",
    "u_equi_static",
    "uniform",
    "watts_strogatz_graph",
    "weights",
]
