"""Every algorithm there is, and what a test needs to run one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
from hypothesis import strategies as st
from torch import Tensor

from p2pfl import aggregation as rules
from p2pfl import codec
from p2pfl.algorithm import Algorithm, Inbox, Rows
from p2pfl.algorithms import (
    average,
    balance,
    beer,
    chebyshev,
    choco,
    d2,
    deepsqueeze,
    diloco,
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
    jwins,
    kgt,
    local,
    moniqua,
    noloco,
    proximal,
    push_diging,
    push_pull,
    push_sum,
    qg,
    quantised,
    rpel,
    ubar,
    weighed,
)
from p2pfl.attacks import ATTACKS, hostile
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.training import train
from p2pfl.peer.plan import Pace
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology import metropolis, push, static, weights

# Blocks are small: more threads only get into each other's way, the more so on a busy machine.
torch.set_num_threads(1)

Build = Callable[[Optimiser], Algorithm[Any, Any, Any]]

RULES: dict[str, rules.Aggregation] = {
    "median": rules.median(),
    "trimmed_mean": rules.trimmed_mean(1),
    "krum": rules.krum(1),
    "multi_krum": rules.multi_krum(1, m=2),
    "geometric_median": rules.geometric_median(),
    "nna": rules.nna(1),
    "nnm": rules.nnm(1),
    "nnm krum": rules.nnm(1, then=rules.krum(1)),
    "centred_clipping": rules.centred_clipping(0.5, iterations=2),
    "clipped_gossip": rules.clipped_gossip(0.5),
    "clipped_gossip f": rules.clipped_gossip(f=1),
    "bucketing": rules.bucketing(rules.median(), s=2),
    "bucketing clipped": rules.bucketing(rules.centred_clipping(0.5), s=2),
}


def _robust(rule: rules.Aggregation) -> Build:
    return lambda opt: dpsgd(opt, aggregate=rule, seed=3)


def _attacked(build: Build, attack: str) -> Build:
    return lambda opt: hostile(build(opt), ATTACKS[attack](), {0, 2}, seed=5)


def own_taste(models: Tensor, nodes: Tensor, steps: Tensor) -> Tensor:
    """Judge models by how far they are from a point which each node chooses anew at every step."""
    point = torch.sin(1.0 + nodes + 0.1 * steps).view(-1, 1, 1).to(models.dtype)
    return (models - point).square().sum(2)


PLAIN: dict[str, Build] = {
    "fedavg": fedavg,
    "fedavg uniform": lambda opt: fedavg(opt, weight="uniform"),
    "dpsgd": dpsgd,
    "dpsgd combine first": lambda opt: dpsgd(opt, order="combine_then_adapt"),
    "push_sum": push_sum,
    "push_sum examples": lambda opt: push_sum(opt, weight="examples"),
    "gosgd": gosgd,
    "gradient_tracking": gradient_tracking,
    "d2": d2,
    "exact_diffusion": exact_diffusion,
    "extra": extra,
    "kgt": kgt,
    "chebyshev": lambda opt: chebyshev(opt, rho=0.9),
    "push_diging": push_diging,
    "push_pull": push_pull,
    "qg": qg,
    "qg nesterov": lambda opt: qg(opt, beta=0.8, mu=0.7, nesterov=True),
    "diloco": diloco,
    "fedavgm": fedavgm,
    "noloco": noloco,
    "noloco gamma": lambda opt: noloco(opt, lr=0.6, momentum=0.8, gamma=0.9),
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "choco identity": lambda opt: choco(opt, codec.identity(), gamma=1.0),
    "choco top_k": lambda opt: choco(opt, codec.top_k(2), gamma=0.4),
    "choco random_k": lambda opt: choco(opt, codec.random_k(share=0.5), gamma=0.3, seed=7),
    "choco half": lambda opt: choco(opt, codec.half(), gamma=0.8),
    "choco bfloat16": lambda opt: choco(opt, codec.bfloat16(), gamma=0.8),
    "choco int8": lambda opt: choco(opt, codec.int8(), gamma=0.8),
    "choco qsgd": lambda opt: choco(opt, codec.qsgd(4, bucket=3), gamma=0.3),
    "choco sign": lambda opt: choco(opt, codec.sign(), gamma=0.3),
    "choco wavelet": lambda opt: choco(opt, codec.wavelet(2, levels=2), gamma=0.3),
    "beer": lambda opt: beer(opt, codec.top_k(2), gamma=0.3),
    "deepsqueeze": lambda opt: deepsqueeze(opt, codec.top_k(2), gamma=0.2),
    "moniqua": lambda opt: moniqua(opt, theta=9.0),
    "jwins": lambda opt: jwins(opt, k=2, levels=1),
    "quantised": lambda opt: quantised(opt, codec.bfloat16()),
    "gossip": gossip,
    "gossip mean": lambda opt: gossip(opt, merge="mean"),
    "gossip limited": lambda opt: gossip(opt, merge="limited", limit=0),
    "gossip update_then_merge": lambda opt: gossip(opt, order="update_then_merge"),
    "gossip random_walk": lambda opt: gossip(opt, order="random_walk"),
    "fedasync": fedasync,
    "fedasync hinge": lambda opt: fedasync(opt, staleness="hinge", a=2.0, b=1),
    "local": local,
    "balance": lambda opt: balance(opt, rounds=8, gamma=1.0),
    "rpel": lambda opt: rpel(opt, nodes=6, attackers=1, s=4, rounds=10),
    "ubar": lambda opt: ubar(opt, own_taste, rho=0.7, alpha=0.4),
    **{f"dpsgd {name}": _robust(rule) for name, rule in RULES.items()},
    "dpsgd combine first median": lambda opt: dpsgd(opt, "combine_then_adapt", rules.median()),
}


# One of each kind, with FedProx's pull around it.
PULLED = (
    *("fedavg", "dpsgd", "dpsgd combine first", "dpsgd krum", "push_sum", "gradient_tracking"),
    *("d2", "kgt", "qg", "diloco", "choco top_k", "choco random_k", "beer", "gossip", "local"),
    "gossip update_then_merge",
)


def _weighed(build: Build) -> Build:
    return lambda opt: weighed(build(opt), mean_examples=20.0)


def _prox(build: Build) -> Build:
    return lambda opt: proximal(build(opt), mu=0.3)


ALL: dict[str, Build] = {
    **PLAIN,
    **{f"proximal {name}": _prox(PLAIN[name]) for name in PULLED},
    **{f"weighed {name}": _weighed(PLAIN[name]) for name in PULLED},
    "average": lambda opt: average(),
    **{f"hostile dpsgd {a}": _attacked(dpsgd, a) for a in ("alie", "gaussian", "replay")},
    "hostile fedavg ipm": _attacked(fedavg, "ipm"),
    "hostile push_sum sign_flip": _attacked(push_sum, "sign_flip"),
    "hostile gossip sign_flip": _attacked(gossip, "sign_flip"),
    "hostile gradient_tracking alie": _attacked(gradient_tracking, "alie"),
}

# What needs whole rows, by words in the names.
WHOLE = ("jwins", "krum", "geometric", "nn", "clip", "balance", "rpel", "ubar", "hostile")


def matrix(graph: nx.Graph, needs: str = "mean", lazy: bool = True) -> Tensor:
    rule = push() if needs == "mass" else metropolis(lazy)
    return weights(static(graph).links(0), rule)


@st.composite
def graphs(draw: st.DrawFn, largest: int = 6) -> nx.Graph:
    """Draw a connected graph: a random tree and some edges on top of it."""
    n = draw(st.integers(1, largest))
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from((node, draw(st.integers(0, node - 1))) for node in range(1, n))
    ends = st.integers(0, n - 1)
    graph.add_edges_from(
        e for e in draw(st.lists(st.tuples(ends, ends), max_size=n)) if len({*e}) == 2
    )
    return graph


@st.composite
def blocks(draw: st.DrawFn, n: int, d: int = 4) -> tuple[Tensor, Rows, Tensor]:
    """Draw parameters ``[n, d]``, who the rows are, and gradients for many steps ``[6, n, d]``."""
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(n, d, generator=made, dtype=torch.float64)
    examples = torch.randint(1, 50, (n,), generator=made)
    grads = torch.randn(6, n, d, generator=made, dtype=torch.float64)
    return x, Rows(torch.arange(n), examples), grads


def exchange(a: Algorithm[Any, Any, Any], state: Any, heard: Any, w: Tensor, d: int) -> Any:
    """Let all rows of a block hear each other; return their state and their memory."""
    heard = a.absorb(heard, a.send(state), d)
    return a.receive(state, Inbox(w, heard, torch.arange(len(w)))), heard


def play(
    a: Algorithm[Any, Any, Any], x: Tensor, rows: Rows, grads: Tensor, w: Tensor, steps: int = 1
) -> Any:
    """Return the state after rounds of so many of the given gradients."""
    state, heard = a.init(x, rows), None
    for i, g in enumerate(grads):
        state = a.step(state, g)
        if (i + 1) % steps == 0:
            state = a.settle(state) if a.settle else state
            state, heard = exchange(a, state, heard, w, x.shape[1])
    return state


def setup(algorithm, task, graph, rule, rounds: int, steps: int = 1) -> Setup:
    topology = static(graph)
    w = weights(topology.links(0), rule)
    every = 10**9  # evaluated after the last round only
    return Setup(
        algorithm,
        task,
        topology,
        rule,
        Pace(rounds, evaluate_every=every),
        lambda nodes: torch.full_like(nodes, steps),
        lambda round: w,
    )


def simulate(algorithm, task, graph, rule, rounds: int, steps: int = 1) -> Simulator:
    simulator = Simulator(setup(algorithm, task, graph, rule, rounds, steps))
    for _ in simulator.rounds():
        pass
    return simulator


def local_train(algorithm, task, x: Tensor, nodes: Tensor, steps: int) -> Any:
    """Return the state of nodes that train and hear nobody."""
    state = algorithm.init(x, Rows(nodes, task.examples(nodes)))
    return train(algorithm, task, state, nodes, nodes * 0, nodes * 0 + steps)[0]
