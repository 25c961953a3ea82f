"""Runs of every algorithm, for the simulator and the emulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import networkx as nx
import torch

from p2pfl import codec
from p2pfl.algorithm import Algorithm
from p2pfl.algorithms import (
    average,
    chebyshev,
    choco,
    d2,
    diloco,
    divshare,
    dpsgd,
    exact_diffusion,
    extra,
    fedadagrad,
    fedadam,
    fedasync,
    fedavg,
    fedavgm,
    fedyogi,
    gosgd,
    gossip,
    gradient_tracking,
    kgt,
    local,
    noloco,
    partial,
    powergossip,
    proximal,
    push_diging,
    push_pull,
    push_sum,
    qg,
    relay,
)
from p2pfl.churn.script import Happening, Script
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import Optimiser, adam, sgd
from p2pfl.learning.spec import Spec
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.plan import Pace
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.setup import Row, Setup
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology import (
    Mixing,
    Topology,
    binary_tree_graph,
    complete_graph,
    exponential_graph,
    links_between,
    metropolis,
    push,
    ring_graph,
    star_graph,
    static,
    uniform,
    weights,
)

# Blocks are small: more threads only get into each other's way, the more so on a busy machine.
torch.set_num_threads(1)

N = 6
RULES = {"mean": metropolis(), "mass": push(), "none": metropolis()}


def sparse_choco(opt: Optimiser) -> Algorithm[Any, Any, Any]:
    return choco(opt, codec.top_k(2), 0.3)


class Case(NamedTuple):
    build: Callable[[Optimiser], Algorithm[Any, Any, Any]]
    graph: Callable[[int], nx.Graph]
    rule: Mixing
    opt: Optimiser = sgd(0.05, momentum=0.5)


SHARED = torch.tensor([1, 2, 4])  # columns, of five
SHAPES = Spec(("weight", "bias"), ((2, 2), (1,)), ("float64", "float64"))  # of five parameters
LONELY = nx.empty_graph(N)
STEADY = NetworkModel(latency=0.1, compute=1.0)

CASES: dict[str, Case] = {
    "fedavg": Case(fedavg, complete_graph, metropolis()),
    "fedavg adam": Case(fedavg, complete_graph, metropolis(), adam(0.02)),
    "dpsgd ring": Case(dpsgd, ring_graph, metropolis()),
    "dpsgd complete": Case(dpsgd, complete_graph, metropolis()),
    "dpsgd directed": Case(dpsgd, exponential_graph, metropolis()),
    "combine first": Case(
        lambda opt: dpsgd(opt, order="combine_then_adapt"), ring_graph, metropolis()
    ),
    "push_sum directed": Case(push_sum, exponential_graph, push()),
    "gosgd": Case(gosgd, exponential_graph, push()),
    "push_sum examples": Case(
        lambda opt: push_sum(opt, weight="examples"), ring_graph, push(), sgd(0.05)
    ),
    "gradient_tracking": Case(gradient_tracking, ring_graph, metropolis()),
    "d2": Case(d2, ring_graph, metropolis(lazy=True)),
    "exact_diffusion": Case(exact_diffusion, ring_graph, metropolis()),
    "extra": Case(extra, ring_graph, metropolis()),
    "chebyshev": Case(lambda opt: chebyshev(opt, 0.7), ring_graph, metropolis()),
    "kgt": Case(lambda opt: kgt(opt, outer_lr=0.8), ring_graph, metropolis()),
    "push_diging": Case(push_diging, exponential_graph, push()),
    "push_pull": Case(push_pull, exponential_graph, push()),
    "qg": Case(lambda opt: qg(opt, nesterov=True), ring_graph, metropolis(), sgd(0.05)),
    "diloco": Case(diloco, ring_graph, metropolis(), adam(0.02)),
    "noloco": Case(lambda opt: noloco(opt, gamma=0.4), ring_graph, metropolis(), adam(0.02)),
    "fedavgm": Case(fedavgm, complete_graph, metropolis()),
    "fedadagrad": Case(fedadagrad, ring_graph, metropolis()),
    "fedadam": Case(fedadam, ring_graph, metropolis()),
    "fedyogi": Case(fedyogi, ring_graph, metropolis()),
    "choco identity": Case(lambda opt: choco(opt, codec.identity(), 0.8), ring_graph, metropolis()),
    "choco top_k": Case(sparse_choco, ring_graph, metropolis()),
    "choco random_k": Case(
        lambda opt: choco(opt, codec.random_k(2), 0.2, seed=3), complete_graph, metropolis()
    ),
    "gossip": Case(gossip, ring_graph, uniform()),
    "gossip limited": Case(
        lambda opt: gossip(opt, merge="limited", limit=2), ring_graph, uniform()
    ),
    "fedasync": Case(fedasync, ring_graph, uniform()),
    "local": Case(local, lambda n: nx.empty_graph(n), metropolis()),
    "proximal": Case(lambda opt: proximal(dpsgd(opt), 0.4), ring_graph, metropolis()),
    "partial": Case(lambda opt: partial(dpsgd(opt), SHARED), ring_graph, metropolis()),
    "partial kgt": Case(lambda opt: partial(kgt(opt), SHARED), ring_graph, metropolis()),
    "partial choco": Case(lambda opt: partial(sparse_choco(opt), SHARED), ring_graph, metropolis()),
    "relay": Case(lambda opt: relay(opt, N), binary_tree_graph, metropolis()),
    "relay pulled": Case(lambda opt: proximal(relay(opt, N), 0.4), star_graph, metropolis()),
    "powergossip": Case(
        lambda opt: powergossip(opt, SHAPES, seed=3), binary_tree_graph, metropolis()
    ),
    "divshare": Case(lambda opt: divshare(opt, 2, seed=3), exponential_graph, uniform()),
    "divshare ring": Case(divshare, ring_graph, metropolis()),
    "average": Case(lambda opt: average(), ring_graph, metropolis()),
}

STEPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one": torch.ones_like,
    "three": lambda nodes: torch.full_like(nodes, 3),
    "unequal": lambda nodes: 1 + nodes % 3,
}


def make(
    case: Case | str,
    pace: Pace | Tempo,
    n: int = N,
    task: Any = None,
    steps: Callable[[torch.Tensor], torch.Tensor] = torch.ones_like,
    topology: Topology | None = None,
) -> Setup:
    case = CASES[case] if isinstance(case, str) else case
    topology = topology or static(case.graph(n))
    period = topology.period or 1
    each = [weights(topology.links(k), case.rule) for k in range(period)]
    return Setup(
        case.build(case.opt),
        task or Quadratics(n, 5, noise=0.1, seed=3),
        topology,
        case.rule,
        pace,
        steps,
        lambda round: each[round % period],
    )


def uneven(seed: int = 0, **more: Any) -> NetworkModel:
    """Nothing is equally fast."""
    given: dict[str, Any] = {
        "latency": 0.1,
        "jitter": 6.0,
        "compute": 1.0,
        "compute_jitter": 2.0,
        "slow": 0.3,
        "slow_factor": 4.0,
        "bandwidth": 2000.0,
        "uplink": 4000.0,
        "seed": seed,
    }
    return NetworkModel(**{**given, **more})


def simulated(setup: Setup) -> tuple[Simulator, list[list[Row]]]:
    simulator = Simulator(setup)
    return simulator, list(simulator.rounds())


def with_crashes(setup: Setup, crashes: dict[int, float]) -> Setup:
    kills = [Happening("kill", seconds=due, nodes=(peer,)) for peer, due in crashes.items()]
    nodes = setup.topology.n
    script = Script("crashes", nodes, tuple(range(nodes)), tuple(kills))
    return dataclasses.replace(setup, churn=script) if kills else setup


def emulated(
    setup: Setup, network: NetworkModel | None = None, crashes: dict[int, float] | None = None
) -> tuple[Emulator, list[list[Row]]]:
    setup = with_crashes(setup, crashes or {})
    emulator = Emulator(setup, network or uneven())
    return emulator, list(emulator.rounds())


def flat(rounds: list[list[Row]]) -> list[Row]:
    return [row for rows in rounds for row in rows]


def one_peer_exponential(n: int = 8) -> Topology:
    """Everybody sends to one other in a round, 1, 2, 4, ... further on in turn."""
    jumps = [1 << j for j in range((n - 1).bit_length())]
    nodes = torch.arange(n)
    each = [links_between(n, nodes, (nodes + jump) % n) for jump in jumps]
    return Topology(n, lambda k: each[k % len(each)], len(each), "one-peer exponential")
