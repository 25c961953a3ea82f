"""A churn script on real processes: peers are killed, frozen and started again, links fail.

Signals do what happens to peers, a `Proxy` what happens to links. A peer that is slow is stopped
and let go on several times a second.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Set
from dataclasses import replace

from p2pfl.churn.script import Happening, Script
from p2pfl.launch.crew import Crew
from p2pfl.launch.proxy import Proxy

PERIOD = 0.2  # seconds in which a slow peer runs once and rests once
LIVES = ("kill", "stop", "cont", "leave", "join", "restart")
ALMOST = 0.999  # the proxy knows no loss that is certain; with this one next to nothing passes


def needs_proxy(script: Script) -> bool:
    """Say whether anything happens to links."""
    return any(one.kind not in (*LIVES, "slow") for one in script.happenings)


class Nemesis:
    """Carries out a churn script.

    Args:
        script: what happens.
        crew: the processes, one for each peer that is there.
        start: starts the process of a peer that joins or comes back.
        proxy: the way between peers; None: nothing happens to links.

    Attributes:
        began: when (monotonic) the time of the script began; None: it has not.
        down: who was killed, has left, is not here yet or was given up.
        frozen: who is stopped.
    """

    def __init__(
        self, script: Script, crew: Crew, start: Callable[[int], None], proxy: Proxy | None
    ) -> None:
        self.began: float | None = None
        self.down = set(range(script.nodes)) - set(script.founders)
        self.frozen = set[int]()
        self._crew, self._start, self._proxy = crew, start, proxy
        self._timed, self._by_round = deque(script.timed), deque(script.by_round)
        self._round = 0  # the furthest that anybody has come to
        self._done = set[int]()  # who has come to an end, good or bad, not by the script
        self._returning = set[int]()  # as soon as their old processes have ended
        self._duties: dict[int, _Duty] = {}

    def begin(self) -> None:
        """Let the time of the script begin; nothing happens before."""
        self.began = time.monotonic()

    def came_to(self, round: int) -> None:
        """Take note that a peer has come to a round."""
        self._round = max(self._round, round)

    def done(self, peer: int) -> None:
        """Take note that a peer has come to its end by itself: nothing happens to it any more."""
        self._done.add(peer)
        self.frozen.discard(peer)
        self._crew.signal(peer, signal.SIGCONT)  # it may have been stopped as it told us

    def ended(self, peer: int) -> None:
        """Take note that the process of a peer has ended."""
        if peer in self._returning:
            self._come(peer)
        elif peer not in self.down:
            self._done.add(peer)

    def give_up(self, peers: Set[int]) -> None:
        """Wait no longer for peers that have come back, or late, to nobody."""
        self.down |= peers

    @property
    def idle(self) -> set[int]:
        """Whom nobody waits for: who is stopped, or is gone and does not come back just now."""
        return self.frozen | (self.down - self._returning)

    @property
    def is_over(self) -> bool:
        """Whether all whom somebody waits for have ended, and nobody else is worth waiting for."""
        return self._crew.running <= self.idle and bool(self._done or not self._timed)

    @property
    def left(self) -> int:
        """How much has not happened yet."""
        return len(self._timed) + len(self._by_round)

    def seconds_left(self, most: float) -> float:
        """Return for how many seconds nothing is due by time; `most` if they are more."""
        if self.began is None:
            return most
        due = [duty.due for peer, duty in self._duties.items() if self._is_running(peer)]
        if self._timed:
            due.append(self.began + (self._timed[0].seconds or 0.0))
        return min([most, *(at - time.monotonic() for at in due)])

    def carry_out(self) -> list[Happening]:
        """Let happen whatever is due; return it, with those only to whom it could happen."""
        if self.began is None:
            return []
        happened = [self._happen(one) for one in self._due(time.monotonic() - self.began)]
        for peer, duty in self._duties.items():
            if duty.due <= time.monotonic() and self._is_running(peer):
                duty.turn()
                self._stop_or_let(peer)
        return [one for one in happened if one is not None]

    def _due(self, seconds: float) -> Iterator[Happening]:
        """Take out what is due, one after the other."""
        while self._timed and (self._timed[0].seconds or 0.0) <= seconds:
            yield self._timed.popleft()
        while self._by_round and (self._by_round[0].round or 0) <= self._round:
            yield self._by_round.popleft()

    def _happen(self, happening: Happening) -> Happening | None:
        kind, nodes = happening.kind, happening.nodes
        if kind in LIVES:
            nodes = tuple(peer for peer in nodes if self._can(kind, peer))
            for peer in nodes:
                self._happen_to(peer, kind)
            return replace(happening, nodes=nodes) if nodes else None
        if kind == "slow":
            for peer in nodes:
                self._slow(peer, happening.value)
        else:
            self._happen_to_links(happening)
        return happening

    def _can(self, kind: str, peer: int) -> bool:
        """Say whether something can happen to a peer just now."""
        if kind in ("join", "restart"):
            return peer in self.down - self._returning
        if kind in ("stop", "cont"):
            return self._is_running(peer) and (peer in self.frozen) == (kind == "cont")
        return self._is_running(peer) or peer in self._returning

    def _is_running(self, peer: int) -> bool:
        return peer in self._crew.running - self.down - self._done

    def _happen_to(self, peer: int, kind: str) -> None:
        match kind:
            case "kill" | "leave" if peer in self._returning:
                self._returning.discard(peer)
            case "kill" | "leave":
                self.down.add(peer)
                self.frozen.discard(peer)
                self._crew.signal(peer, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
                self._crew.signal(peer, signal.SIGCONT)  # a stopped process cannot hear
            case "join" | "restart" if peer in self._crew.running:  # its address is taken
                self._returning.add(peer)
            case "join" | "restart":
                self._come(peer)
            case "stop":
                self.frozen.add(peer)
                self._stop_or_let(peer)
            case "cont":
                self.frozen.discard(peer)
                self._stop_or_let(peer)

    def _come(self, peer: int) -> None:
        self.down.discard(peer)
        self._returning.discard(peer)
        self._start(peer)
        if peer in self._duties:
            self._duties[peer] = _Duty(self._duties[peer].factor)

    def _slow(self, peer: int, factor: float) -> None:
        self._duties.pop(peer, None)
        if factor > 1:
            self._duties[peer] = _Duty(factor)
        if self._is_running(peer):
            self._stop_or_let(peer)

    def _stop_or_let(self, peer: int) -> None:
        """Stop a process or let it go on, whichever it should."""
        rests = peer in self._duties and self._duties[peer].rests
        stopped = rests or peer in self.frozen
        self._crew.signal(peer, signal.SIGSTOP if stopped else signal.SIGCONT)

    def _happen_to_links(self, happening: Happening) -> None:
        assert self._proxy is not None
        links, value = happening.links, happening.value
        match happening.kind:
            case "partition":
                self._proxy.partition(happening.groups)
            case "heal":
                self._proxy.heal()
            case "delay":
                self._proxy.delay(links, value)
            case "drop":
                self._proxy.drop(links, min(value, ALMOST))
            case "corrupt":
                self._proxy.corrupt(links, value)


class _Duty:
    """When a slow peer runs and when it rests.

    Args:
        factor: how many times slower it is, above 1.

    Attributes:
        rests: whether it rests.
        due: when (monotonic) that changes.
    """

    def __init__(self, factor: float) -> None:
        self.factor, self.rests = factor, False
        self._since = time.monotonic()
        self.due = self._since + PERIOD / factor

    def turn(self) -> None:
        """Let it run for its share of the period, or rest for as long as it has run demands."""
        now = time.monotonic()
        ran, self._since, self.rests = now - self._since, now, not self.rests
        self.due = now + (ran * (self.factor - 1) if self.rests else PERIOD / self.factor)
