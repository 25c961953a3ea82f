"""Many peers under one virtual clock, with a network and with faults; the same for the same seed.

What runs here is `Swim` as it runs in a real peer. Only the clock, the network and the
processes are made up.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, TypeAlias

from p2pfl.membership.members import Change, incarnation
from p2pfl.membership.swim import Swim
from p2pfl.membership.timers import Timers

RESEND = 0.2  # seconds until TCP sends a lost packet again, at first
MOST_RESENDS = 6
AFTER = 1e-9  # seconds: a timer goes off when its time is over, whatever the rounding
DRAIN = 1e-6  # seconds in which who was frozen reads its mail, before its timers go off

Link: TypeAlias = tuple[int, int]  # from, to


class Network(NamedTuple):
    """What becomes of messages.

    Attributes:
        latency: the shortest and the longest, in seconds; drawn for each message, so the wider
            the range, the more overtake each other.
        resent: the share of packets that is lost and sent again by TCP, which takes time.
        lost: the share of messages that never arrives.
        doubled: the share that arrives twice.
    """

    latency: tuple[float, float] = (0.0003, 0.003)
    resent: float = 0.0
    lost: float = 0.0
    doubled: float = 0.0


class Observed(NamedTuple):
    """What a peer took note of."""

    time: float
    observer: int
    change: Change


@dataclass(slots=True)
class Process:
    """Where a peer runs.

    Attributes:
        swim: the peer.
        boot: how often it was started.
        rate: seconds of its own clock in a second.
        up: whether it runs.
        frozen_until: it neither hears nor does anything before.
        wake_at: when it is woken next, in seconds.
    """

    swim: Swim
    boot: int
    rate: float
    up: bool = True
    frozen_until: float = 0.0
    wake_at: float = math.inf


class Cluster:
    """Peers, and what happens to them.

    Args:
        timers: of all peers.
        seed: of everything that is drawn.
        network: what becomes of messages; may be set anew at any time.
        make: what makes a peer, with the arguments of `Swim`.

    Attributes:
        now: in seconds.
        processes: by id.
        blocked: links on which nothing arrives.
        log: all changes that peers have taken note of.
        after: called after every event with the id of the peer it befell.
    """

    def __init__(
        self,
        timers: Timers,
        seed: int,
        network: Network = Network(),  # noqa: B008 - a tuple
        make: Callable[..., Swim] = Swim,
    ) -> None:
        self.network, self.now = network, 0.0
        self.processes: dict[int, Process] = {}
        self.blocked: frozenset[Link] = frozenset()
        self.log: list[Observed] = []
        self.after: Callable[[int], None] = lambda peer: None
        self._timers, self._make, self._rng = timers, make, random.Random(seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = count()

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do something at this time."""
        heapq.heappush(self._heap, (time, next(self._serial), action))

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = until

    def boot(
        self,
        peer: int,
        contacts: Iterable[int] = (),
        others: Mapping[int, str] | None = None,
        rate: float = 1.0,
    ) -> None:
        """Start a process, or start it again after it ended.

        Args:
            peer: which.
            contacts: whom it asks for what they know.
            others: whom it takes to be there; None: nobody.
            rate: seconds of its clock in a second.
        """
        last = self.processes.get(peer)
        boot = last.boot + 1 if last else 1
        seed, where = self._rng.getrandbits(64), f"tcp://10.0.0.{peer}:{7000 + boot}"
        swim = self._make(peer, incarnation(boot), self._timers, others or {}, seed, where)
        self.processes[peer] = Process(swim, boot, rate)
        swim.start(self.now * rate)
        swim.join(self.now * rate, contacts)
        self._settle(peer)

    def boot_all(self, n: int) -> None:
        """Start peers 0 .. n-1, who know of each other."""
        for peer in range(n):
            self.boot(peer, others=dict.fromkeys(range(n), ""))

    def crash(self, peer: int) -> None:
        """End a process without a word."""
        self.processes[peer].up = False

    def freeze(self, peer: int, seconds: float) -> None:
        """Let a process do nothing for a while; what is sent to it waits."""
        process = self.processes[peer]
        process.frozen_until = max(process.frozen_until, self.now + seconds)

    def leave(self, peer: int) -> None:
        """Let a peer say goodbye, and its process run on."""
        process = self.processes[peer]
        process.swim.leave(self.now * process.rate)
        self._settle(peer)

    def hint(self, peer: int, about: int) -> None:
        """Let a peer's link to another break."""
        process = self.processes[peer]
        process.swim.probe(self.now * process.rate, about)
        self._settle(peer)

    def swims(self) -> dict[int, Swim]:
        """Return the peers whose processes run."""
        return {k: process.swim for k, process in self.processes.items() if process.up}

    def _settle(self, peer: int) -> None:
        """Carry out what a peer wants after something befell it."""
        process = self.processes[peer]
        for to, body in process.swim.letters():
            self._post(peer, to, body)
        for change in process.swim.changes():
            self.log.append(Observed(self.now, peer, change))
        if (due := process.swim.due() / process.rate + AFTER) < process.wake_at:
            self._set_wake(peer, process, max(due, self.now))
        self.after(peer)

    def _post(self, sender: int, to: int, body: bytes) -> None:
        network, draw = self.network, self._rng.random
        if network.lost and draw() < network.lost:
            return
        for _ in range(2 if network.doubled and draw() < network.doubled else 1):
            delay, resends = self._rng.uniform(*network.latency), 0
            while network.resent and draw() < network.resent and resends < MOST_RESENDS:
                delay, resends = delay + RESEND * 2**resends, resends + 1
            self.at(self.now + delay, lambda: self._deliver(sender, to, body))

    def _deliver(self, sender: int, to: int, body: bytes) -> None:
        process = self.processes.get(to)
        if process is None or not process.up or (sender, to) in self.blocked:
            return
        if process.frozen_until > self.now:
            self.at(process.frozen_until, lambda: self._deliver(sender, to, body))
            return
        process.swim.hear(self.now * process.rate, sender, body)
        self._settle(to)

    def _set_wake(self, peer: int, process: Process, time: float) -> None:
        process.wake_at = time
        self.at(time, lambda: self._wake(peer, process, time))

    def _wake(self, peer: int, process: Process, time: float) -> None:
        if self.processes[peer] is not process or not process.up or process.wake_at != time:
            return
        if process.frozen_until > self.now:
            self._set_wake(peer, process, process.frozen_until + DRAIN)
            return
        process.wake_at = math.inf
        process.swim.tick(self.now * process.rate)
        self._settle(peer)
