"""What one seed draws: peers that learn, a network, and a minute of faults."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch

from p2pfl import codec
from p2pfl.algorithms import choco, dpsgd, fedavg, gossip, push_sum
from p2pfl.churn.script import Happening, Script
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.membership.timers import Timers
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.plan import Pace
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.setup import Setup
from p2pfl.topology import (
    barabasi_albert_graph,
    complete_graph,
    erdos_renyi_graph,
    exponential_graph,
    metropolis,
    one_peer_exponential,
    push,
    random_matching,
    random_regular_graph,
    ring_graph,
    static,
    weights,
)
from p2pfl.topology.live import Overlay

# Blocks are small: more threads only get into each other's way, the more so on a busy machine.
torch.set_num_threads(1)

FAULTS_END = 60.0
DIMENSIONS = 3
FOREVER = 10**6  # rounds: the swarm ends such a run itself
SENT = 6000  # models in a minute and a half, about: whoever has many neighbours is slower

RULES = {
    "ring": lambda n, seed: static(ring_graph(n)),
    "complete": lambda n, seed: static(complete_graph(n)),
    "regular": lambda n, seed: static(random_regular_graph(n, 4, seed)),
    "matching": lambda n, seed: random_matching(n, seed),
    "exponential": lambda n, seed: static(exponential_graph(n)),
    "one_peer": lambda n, seed: one_peer_exponential(n),
}
GRAPHS = {  # which have no rule, as if they came from a file
    "hubs": lambda n, seed: static(barabasi_albert_graph(n, 2, seed)),
    "sparse": lambda n, seed: static(erdos_renyi_graph(n, min(0.95, 4 / n + 0.1), seed)),
}
SYMMETRIC = ("ring", "complete", "regular", "matching", "hubs", "sparse")
ALGORITHMS = {
    "dpsgd": (dpsgd, metropolis(), (*SYMMETRIC, "one_peer")),
    "combine first": (
        lambda opt: dpsgd(opt, order="combine_then_adapt"),
        metropolis(),
        SYMMETRIC,
    ),
    "fedavg": (fedavg, metropolis(), ("complete",)),
    "push_sum": (push_sum, push(), (*RULES, *GRAPHS)),
    "choco": (
        lambda opt: choco(opt, codec.identity(), 0.8),
        metropolis(),
        ("ring", "complete", "sparse"),
    ),
    "gossip": (gossip, metropolis(), ("ring", "regular", "exponential", "hubs")),
}
KINDS = (
    *("kill", "kill", "restart", "restart", "stop", "stop", "leave", "join"),
    *("partition", "isolate", "heal", "slow", "drop", "delay", "corrupt"),
)
LOSSY = ("partition", "isolate", "drop", "corrupt")


class Plan(NamedTuple):
    """All that one seed draws."""

    seed: int
    n: int
    algorithm: str
    topology: str
    rate: float  # of learning
    pace: Pace | Tempo
    timers: Timers | None
    network: NetworkModel
    founders: tuple[int, ...]
    faults: tuple[Happening, ...]

    def __str__(self):
        pace = self.pace
        waits = "" if isinstance(pace, Tempo) else f", patience {pace.patience:.3g}"
        return (
            f"n = {self.n}, {self.algorithm} on {self.topology}, lr {self.rate}{waits},"
            f" {'overlap, ' * getattr(pace, 'overlap', False)}{self.network}, {self.timers}"
        )

    @property
    def script(self):
        every = tuple(sorted(valid(self), key=lambda one: one.seconds))
        return Script("swarm", self.n, self.founders, every)


class Scattered(Quadratics):
    """Everybody begins somewhere else, so that averaging has something to do."""

    def init(self, nodes):
        draw = torch.Generator().manual_seed(self.seed + 1)
        rows = torch.randn(len(self.b), self.d, generator=draw, dtype=torch.float64)
        return 3 + rows[nodes.cpu()]


def topology(plan):
    name, rule = plan.topology, RULES.get(plan.topology)
    full = (rule or GRAPHS[name])(plan.n, plan.seed)
    return full, Overlay(full, (lambda n: rule(n, plan.seed)) if rule else None)


def setup(plan):
    """Return the run of a plan."""
    build, mixing, _ = ALGORITHMS[plan.algorithm]
    full, overlay = topology(plan)
    return Setup(
        build(sgd(plan.rate)),
        Scattered(plan.n, DIMENSIONS, noise=0.1, seed=plan.seed),
        full,
        mixing,
        plan.pace,
        torch.ones_like,
        lambda round: weights(full.links(round), mixing),
        among=overlay.among if plan.timers else None,
        churn=plan.script,
        membership=plan.timers,
    )


def draw(seed):
    rng = random.Random(seed)
    n = rng.choice([3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 12])
    n = n if rng.random() < 0.92 else rng.choice([16, 24, 32])
    names = [*("dpsgd",) * 6, "combine first", "fedavg", "push_sum", "push_sum", "choco", "gossip"]
    algorithm = rng.choice(names)
    kinds = [one for one in ALGORITHMS[algorithm][2] if n > 5 or one != "regular"]
    plan = Plan(
        seed,
        n,
        algorithm,
        rng.choice(kinds),
        rng.choice([0.0, 0.0, 0.05]),
        Pace(1),
        rng.choice([None, *(Timers(),) * 5, Timers(suspicion_mult=3, exchange=2.0)]),
        NetworkModel(),
        tuple(range(n)) if rng.random() < 0.7 else tuple(range(rng.randint(2, n))),
        (),
    )
    sent = n * len(topology(plan)[0].view(0, 0)[0])
    compute = max(rng.uniform(0.2, 0.6), sent * 90 / SENT)
    allowed = [kind for kind in KINDS if rng.random() < 0.8] or ["kill"]
    loss = rng.choice([0.0, 0.0, 0.0, 0.02, 0.1])
    patience = compute * rng.choice([0.0, 0.5, 1.0, 1.0, 3.0, 3.0, 10.0, 10.0])
    if rng.random() < 0.1:  # who waits for ever must be able to count on what is sent
        patience, loss = math.inf, 0.0
        allowed = [kind for kind in allowed if kind not in LOSSY] or ["kill"]
    if algorithm == "push_sum":  # nothing makes good what is lost of a mass
        loss, allowed = 0.0, [one for one in allowed if one not in ("drop", "corrupt")] or ["kill"]
    network = NetworkModel(
        latency=rng.choice([0.001, 0.02, rng.uniform(0.01, 0.2)]),
        jitter=rng.choice([0.0, 3.0]),
        loss=loss,
        compute=compute,
        compute_jitter=rng.choice([0.0, 0.2, 1.0]),
        slow=rng.choice([0.0, 0.0, 0.2]),
        slow_factor=max(1.0, min(10.0, 6.0 / compute)),
        seed=seed,
    )
    pace = Pace(
        FOREVER if rng.random() < 0.7 else rng.randint(5, 150),
        patience=patience,
        evaluate_every=rng.choice([0, 0, 10]),
        overlap=algorithm in ("dpsgd", "push_sum", "fedavg") and rng.random() < 0.15,
    )
    if algorithm == "gossip":
        pace = Tempo(2 * compute, int((FAULTS_END + 60) / 2 / compute), seed=seed)
    if network.slow:  # nobody is slowed down twice: a round would last a minute
        allowed = [kind for kind in allowed if kind != "slow"] or ["kill"]
    plan = plan._replace(network=network, pace=pace)
    if algorithm == "push_sum" and (not plan.timers or {"partition", "isolate"} & {*allowed}):
        plan = plan._replace(rate=0.0)  # whose mass gets small is thrown off by a local step
    return plan._replace(faults=_faults(rng, plan, allowed))


def _faults(rng, plan, allowed):
    faults, time, every = [], 1.0, rng.choice([1.0, 4.0, 10.0])
    while (time := time + rng.expovariate(1 / every)) < FAULTS_END:
        faults += _fault(rng, plan.n, rng.choice(allowed), time)
    return tuple(faults)


def _fault(rng, n, kind, time):
    node = rng.randrange(n)
    ids = list(range(n))
    rng.shuffle(ids)
    match kind:
        case "stop":
            longest = rng.choice([1.0, 5.0, 15.0])
            until = min(FAULTS_END, time + rng.uniform(0.1, longest))
            return [
                Happening("stop", seconds=time, nodes=(node,)),
                Happening("cont", seconds=until, nodes=(node,)),
            ]
        case "partition":
            a = rng.randint(1, n - 1)
            b = rng.choice([a, rng.randint(a, n)])
            groups = [tuple(sorted(part)) for part in (ids[:a], ids[a:b], ids[b:]) if part]
            return [Happening("partition", seconds=time, groups=tuple(groups))]
        case "isolate":
            return [Happening("partition", seconds=time, groups=((node,), tuple(ids_but(n, node))))]
        case "heal":
            return [Happening("heal", seconds=time)]
        case "slow":
            factor = rng.choice([1.0, 10.0])
            return [Happening("slow", seconds=time, nodes=(node,), value=factor)]
        case "drop" | "delay" | "corrupt":
            links = [(a, b) for a in ids for b in ids if a != b and rng.random() < 0.3]
            value = rng.choice([0.0, rng.uniform(0.05, 1.0)])
            named = rng.choice([tuple(links), None])
            return [Happening(kind, seconds=time, links=named, value=value)]
    return [Happening(kind, seconds=time, nodes=(node,))]


def ids_but(n, node):
    return [k for k in range(n) if k != node]


GOING = ("kill", "leave")
COMING = ("restart", "join")


class Lives:
    """Who is up, frozen, killed or gone by what has happened so far."""

    def __init__(self, n, founders):
        self.state = {k: "up" if k in founders else "left" for k in range(n)}

    def there(self):
        return [k for k, state in self.state.items() if state in ("up", "frozen")]

    def allows(self, one):
        """Say whether something can happen, and take note that it does."""
        needed = {
            "kill": ("up", "frozen"),
            "leave": ("up",),
            "stop": ("up",),
            "cont": ("frozen",),
            "restart": ("killed",),
            "join": ("left",),
        }.get(one.kind)
        if needed is None:
            return True
        last = one.kind in GOING and len(self.there()) == 1
        if last or any(self.state[k] not in needed for k in one.nodes):
            return False
        after = {"kill": "killed", "leave": "left", "stop": "frozen"}.get(one.kind, "up")
        self.state |= dict.fromkeys(one.nodes, after)
        return True

    def who(self, state):
        return [k for k, one in self.state.items() if one == state]


def valid(plan):
    """Leave out what cannot happen; end with everything as it should be, and somebody back."""
    rng, lives = random.Random(plan.seed), Lives(plan.n, plan.founders)
    kept = [one for one in sorted(plan.faults, key=lambda one: one.seconds) if lives.allows(one)]
    end, every = FAULTS_END, tuple(range(plan.n))
    kept += [Happening("cont", seconds=end, nodes=(k,)) for k in lives.who("frozen")]
    for kind, state in (("restart", "killed"), ("join", "left")):
        back = [k for k in lives.who(state) if rng.random() < 0.5]
        kept += [Happening(kind, seconds=end + 1, nodes=(k,)) for k in back]
    kept += [Happening("slow", seconds=end, nodes=every, value=1.0)]
    return kept + [Happening(kind, seconds=end) for kind in ("heal", "drop", "delay", "corrupt")]
