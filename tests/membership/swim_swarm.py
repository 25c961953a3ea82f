"""Clusters to which everything happens: a minute of faults, then none, then all must agree."""

from __future__ import annotations

import hashlib
import random
from typing import NamedTuple

from swim_invariants import Broken, Watch

from p2pfl.membership.cluster import Cluster, Network
from p2pfl.membership.members import Status
from p2pfl.membership.swim import Swim
from p2pfl.membership.timers import Timers

FAULTS_END = 60.0
AGREED_BY = 90.0  # seconds later
KINDS = (
    *("crash", "crash", "restart", "restart", "restart", "restart", "leave", "freeze", "freeze"),
    *("halves", "isolate", "one way", "heal", "heal", "network", "hint"),
)
NETWORKS = (
    Network(),
    Network(latency=(0.001, 0.15)),
    Network(resent=0.1),
    Network(latency=(0.001, 0.05), resent=0.3),
    Network(lost=0.05),
    Network(lost=0.2, doubled=0.5),
    Network(latency=(0.0, 0.4), doubled=0.2),
)


class Fault(NamedTuple):
    time: float
    kind: str
    peer: int = 0
    seconds: float = 0.0
    mask: int = 0  # peers on the one side, a bit each; or which network, or whom a hint is about

    def __str__(self):
        return f"{self.time:7.3f} {self.kind} {self.peer} {self.seconds:.3f} {self.mask:#x}"


class Plan(NamedTuple):
    """All that one seed draws."""

    seed: int
    n: int
    timers: Timers
    know_each_other: bool
    rates: tuple[float, ...]
    network: Network
    faults: tuple[Fault, ...]


def draw(seed):
    rng = random.Random(seed)
    n = rng.choice([3, 3, 4, 5, 6, 7, 8, 9, 12]) if rng.random() < 0.95 else rng.choice([16, 32])
    timers = Timers(
        suspicion_mult=rng.choice([3, 4, 6]),
        exchange=rng.choice([2.0, 10.0]),
        recontact=rng.choice([2.0, 5.0]),
        to_dead=rng.choice([2.0, 10.0]),
    )
    rates = tuple(rng.choice([1.0, rng.uniform(0.99, 1.01)]) for _ in range(n))
    know, network = rng.random() < 0.5, rng.choice(NETWORKS)
    faults, time, every = [], 1.0, rng.choice([1.0, 4.0, 10.0])
    allowed = [kind for kind in KINDS if rng.random() < 0.8] or ["crash"]
    while (time := time + rng.expovariate(1 / every)) < FAULTS_END:
        longest = rng.choice([1.0, 5.0, 15.0])
        seconds, mask = rng.uniform(0.1, longest), rng.getrandbits(n)
        faults.append(Fault(time, rng.choice(allowed), rng.randrange(n), seconds, mask))
    return Plan(seed, n, timers, know, rates, network, tuple(faults))


class Run:
    """A plan as it is carried out; `make` makes peers, which a mutant may do otherwise."""

    def __init__(self, plan, make=Swim):
        self.plan = plan
        self.cluster = Cluster(plan.timers, plan.seed, plan.network, make)
        self.watch = Watch(self.cluster, plan.timers)
        self.left = set()

    def perform(self):
        """Run it all; raises `Broken`, and returns after how many seconds they agreed."""
        for peer in range(self.plan.n):
            self.boot(peer)
        for fault in self.plan.faults:
            self.cluster.at(fault.time, lambda fault=fault: self.befall(fault))
        self.cluster.run(FAULTS_END)
        self.heal()
        while trouble := self.disagreement():
            if self.cluster.now >= FAULTS_END + AGREED_BY:
                raise Broken(f"no agreement {AGREED_BY:.0f} s after the last fault: {trouble}")
            self.cluster.run(self.cluster.now + 1)
        return self.cluster.now - FAULTS_END

    def boot(self, peer):
        n, know = self.plan.n, self.plan.know_each_other
        others = [k for k in range(n) if k != peer]
        if peer in self.cluster.processes:
            self.watch.reached.add("rejoin")
        self.left.discard(peer)
        self.cluster.boot(
            peer,
            contacts=others[:3] if know else others,
            others=dict.fromkeys(others, "") if know else None,
            rate=self.plan.rates[peer],
        )

    def befall(self, fault):  # noqa: C901 - a line or two for each kind
        _, kind, peer, seconds, mask = fault
        cluster, n = self.cluster, self.plan.n
        runs = cluster.processes[peer].up
        side = [k for k in range(n) if mask >> k & 1]
        other = [k for k in range(n) if not mask >> k & 1]
        match kind:
            case "crash":
                cluster.crash(peer)
            case "restart" if not runs:
                self.boot(peer)
            case "leave" if runs and cluster.processes[peer].frozen_until <= cluster.now:
                cluster.leave(peer)
                self.left.add(peer)
                cluster.at(cluster.now + seconds, self.ender(peer))
            case "freeze" if runs:
                cluster.freeze(peer, seconds)
            case "halves":
                self.block([(a, b) for a in side for b in other], both=True)
            case "isolate":
                self.block([(peer, k) for k in range(n)], both=True)
            case "one way":
                self.block([(a, b) for a in side for b in other if a + b & 1], both=False)
            case "heal":
                cluster.blocked = frozenset()
            case "network":
                cluster.network = NETWORKS[mask % len(NETWORKS)]
            case "hint" if runs and cluster.processes[peer].frozen_until <= cluster.now:
                cluster.hint(peer, mask % n)

    def ender(self, peer):
        """Return what ends the process that runs now, if it still does by then."""
        process = self.cluster.processes[peer]

        def end():
            process.up = False

        return end

    def block(self, links, both):
        self.cluster.blocked = frozenset(links + [(b, a) for a, b in links if both])
        self.watch.reached.add("partition")

    def heal(self):
        cluster, rng = self.cluster, random.Random(self.plan.seed)
        cluster.blocked, cluster.network = frozenset(), Network()
        for peer, process in cluster.processes.items():
            process.frozen_until = 0.0
            if process.up and peer in self.left:
                process.up = False
            # Somebody must be there whom all know, or those who know nobody else stay alone.
            if not process.up and (peer < 1 or rng.random() < 0.5):
                self.boot(peer)

    def disagreement(self):
        """Say who sees what otherwise than it is; empty if nobody does."""
        swims = self.cluster.swims()
        truth = {k: (Status.ALIVE, swim.members[k].incarnation) for k, swim in swims.items()}
        for k, swim in swims.items():
            members = [swim.members[other] for other in swim.live]
            seen = {one.id: (one.status, one.incarnation) for one in members}
            if seen != truth:
                wrong = sorted(x for x in seen.keys() | truth if seen.get(x) != truth.get(x))
                return f"{k} is wrong about {wrong}"
        return ""

    def trace(self):
        """Return a digest of all that was noted, and of how much was said."""
        said = [swim.statistics for swim in self.cluster.swims().values()]
        return hashlib.sha256(repr((self.cluster.log, said)).encode()).hexdigest()


def fails(plan, make=Swim):
    """Return what is broken under a plan, or nothing. An error of any kind counts."""
    try:
        Run(plan, make).perform()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def shrink(plan, make=Swim, most=300):
    """Return a plan with as few of the faults as it takes to fail, within so many trials."""
    step = max(1, len(plan.faults) // 2)
    while most > 0:
        for start in range(0, len(plan.faults), step):
            less = plan._replace(faults=plan.faults[:start] + plan.faults[start + step :])
            most -= 1
            if fails(less, make):
                plan = less
                break
            if most <= 0:
                break
        else:
            if step == 1:
                break
            step = max(1, step // 2)
    return plan


def report(plan, trouble, make=Swim):
    """Return how to see a failure again, and the least that leads to it."""
    small = shrink(plan, make)
    fewer = f"{len(small.faults)} of {len(plan.faults)} faults"
    lines = [
        f"seed {plan.seed}: {trouble}",
        f"again: python -m pytest tests/membership/test_swarm.py --swarm-seed {plan.seed}",
        f"{fewer} suffice among {plan.n} peers: {fails(small, make)}",
        *(f"  {fault}" for fault in small.faults),
    ]
    return "\n".join(lines)
