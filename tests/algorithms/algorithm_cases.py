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
    jwins,
    kgt,
    local,
    moniqua,
    noloco,
    powergossip,
    proximal,
    push_diging,
    push_pull,
    push_sum,
    qg,
    quantised,
    relay,
    rpel,
    ubar,
    weighed,
)
from p2pfl.attacks import ATTACKS, hostile
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.spec import Spec
from p2pfl.learning.training import train
from p2pfl.peer.addressed import side_by_side, spread
from p2pfl.peer.plan import Pace
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology import metropolis, push, static, weights
from p2pfl.topology.schedule import links_between

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

MATRIX = Spec(("weight",), ((2, 2),), ("float64",))


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
    "relay": lambda opt: relay(opt, n=6),
    "divshare": lambda opt: divshare(opt, fragments=3, seed=5),
    "powergossip": lambda opt: powergossip(opt, MATRIX),
    "powergossip whole": lambda opt: powergossip(opt, MATRIX, rank=2),
    "divshare whole": lambda opt: divshare(opt, fragments=1),
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
WHOLE += ("relay", "divshare", "powergossip")


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


def told(rows: Rows, w: Tensor) -> Rows:
    """Return rows that know their neighbours, who are those with a weight."""
    heard = [rows.nodes[line != 0].tolist() for line in w]
    others = [sorted({*ids} - {me}) for me, ids in zip(rows.nodes.tolist(), heard, strict=True)]
    k = max(1, *map(len, others))
    return rows._replace(neighbours=torch.tensor([[*o, *[-1] * (k - len(o))] for o in others]))


def some(rows: Rows, which: list[int] | Tensor) -> Rows:
    return Rows(*(None if field is None else field[which] for field in rows))


def inbox(
    a: Algorithm[Any, Any, Any],
    state: Any,
    heard: Any,
    w: Tensor,
    d: int,
    nodes: Tensor | None = None,
) -> Inbox[Any]:
    """Return what all rows of a block hear; they are called ``0 .. n-1`` unless `nodes` says so."""
    message, own = a.send(state), torch.arange(len(w))
    if a.needs.addressed:
        order = own if nodes is None else nodes
        back, k = order.argsort(), message[0].shape[1]
        by_id = w[back][:, back]
        ends = (by_id * (1 - torch.eye(len(w)))).nonzero()
        links = links_between(len(w), ends[:, 1], ends[:, 0])
        wide = spread(by_id, links, k).to_dense().view(len(w), len(w), k)
        w, own = wide[order][:, order].flatten(1), own * k
        message = side_by_side(message)
    return Inbox(w, a.absorb(heard, message, d), own)


def exchange(
    a: Algorithm[Any, Any, Any],
    state: Any,
    heard: Any,
    w: Tensor,
    d: int,
    nodes: Tensor | None = None,
) -> Any:
    """Let all rows of a block hear each other; return their state and their memory."""
    known = inbox(a, state, heard, w, d, nodes)
    return a.receive(state, known), known.heard


def play(
    a: Algorithm[Any, Any, Any], x: Tensor, rows: Rows, grads: Tensor, w: Tensor, steps: int = 1
) -> Any:
    """Return the state after rounds of so many of the given gradients."""
    state, heard = a.init(x, told(rows, w)), None
    for i, g in enumerate(grads):
        state = a.step(state, g)
        if (i + 1) % steps == 0:
            state = a.settle(state) if a.settle else state
            state, heard = exchange(a, state, heard, w, x.shape[1], rows.nodes)
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
