"""A churn script in the emulator: peers are killed, frozen and started again, links fail."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from p2pfl.churn.script import Happening, Script
from p2pfl.peer import joining
from p2pfl.peer.events import PeerDown, PeerId
from p2pfl.peer.joining import Offer
from p2pfl.runtime.chronicle import Chronicle
from p2pfl.runtime.later import Later
from p2pfl.runtime.rosters import Machines, Oracle, Rosters, Tick, Told
from p2pfl.runtime.turmoil import Turmoil

if TYPE_CHECKING:
    from p2pfl.runtime.emulate import Emulator

QUIET = 120.0  # virtual seconds in which nothing but membership goes on: nobody goes on any more
NOBODY = -1  # to whom things happen that happen to no peer


class Churning:
    """Carries out a churn script.

    Args:
        emulator: on whose peers.

    Attributes:
        turmoil: the faults in force.
        chronicle: what has happened, and who noticed it when.
    """

    def __init__(self, emulator: Emulator) -> None:
        setup, self._emulator = emulator.setup, emulator
        nodes = setup.topology.n
        script = setup.churn or Script("", nodes, tuple(range(nodes)))
        self.turmoil = Turmoil(script, emulator.network)
        self.chronicle = Chronicle(sorted(self.turmoil.down))
        self.rosters: Rosters = Oracle(emulator)
        if setup.churn and setup.membership:
            self.rosters = Machines(emulator, setup.membership, emulator.network.seed)
        self._arriving: set[PeerId] = set()
        self._lively = 0.0  # when anything happened last besides membership

    @property
    def is_over(self) -> bool:
        """Whether nobody goes on."""
        emulator = self._emulator
        done = len(emulator.stopped) == len(emulator.peers)
        return (done and not self._arriving) or emulator.time - self._lively > QUIET

    def begin(self) -> None:
        """Put the script into the heap."""
        emulator = self._emulator
        founders = sorted(emulator.peers)
        for happening in self.turmoil.timed:
            assert happening.seconds is not None
            emulator.at(happening.seconds, NOBODY, partial(self._apply, happening))
        for peer in founders:
            for absent in sorted(self.turmoil.down):
                emulator.tell(peer, PeerDown(absent))
        self.rosters.begin(founders)
        self._came_to(0)

    def hear(self, peer: PeerId, happens: Told | Tick) -> None:
        """Pass on what is for the membership machine of a peer."""
        assert isinstance(self.rosters, Machines)
        if isinstance(happens, Told):
            self.rosters.hear(peer, happens)
        else:
            self.rosters.tick(peer, happens)

    def note_life(self) -> None:
        """Take note that something happens besides membership."""
        self._lively = self._emulator.time

    def ended_round(self, peer: PeerId, round: int) -> None:
        """Take note of how far a peer is."""
        self.rosters.ended_round(peer, round)
        self.chronicle.ended_round(self._emulator.time, peer)
        self._came_to(round + 1)

    def done(self, peer: PeerId) -> None:
        """Take note that a peer has come to its end."""
        self.rosters.left(peer)

    def _came_to(self, round: int) -> None:
        for happening in self.turmoil.due_by_round(round):
            self._emulator.at(self._emulator.time, NOBODY, partial(self._apply, happening))

    def _apply(self, happening: Happening) -> None:
        self.chronicle.happened(self._emulator.time, happening)
        match happening.kind:
            case "kill" | "leave" | "stop" | "cont" | "join" | "restart":
                for peer in happening.nodes:
                    self._apply_to(peer, happening.kind)
            case _:
                self.turmoil.set_links(happening)

    def _apply_to(self, peer: PeerId, kind: str) -> None:
        emulator = self._emulator
        running = peer in emulator.peers and peer not in emulator.stopped
        match kind:
            case "join" | "restart" if peer in self.turmoil.down:
                self.turmoil.down.discard(peer)
                self._ask_for_models(peer)
            case "stop" if running:
                emulator.freeze(peer)
            case "cont" if emulator.is_frozen(peer):
                emulator.thaw(peer)
            case "kill" | "leave" if running or peer in self._arriving:
                self._end(peer, kind == "leave")

    def _end(self, peer: PeerId, politely: bool) -> None:
        emulator, came = self._emulator, peer not in self._arriving
        self._arriving.discard(peer)
        self.turmoil.down.add(peer)
        if came and politely:
            self.rosters.left(peer)
        emulator.vanish(peer)
        if came and not politely:
            self.rosters.crashed(peer)

    def _ask_for_models(self, peer: PeerId) -> None:
        """Let a peer that comes, or comes back, ask a few others for their models."""
        emulator, self._arriving = self._emulator, self._arriving | {peer}
        there = [p for p in sorted(emulator.peers) if p not in emulator.stopped]
        open_ = [p for p in there if not (emulator.is_frozen(p) or self.turmoil.is_cut((p, peer)))]
        near = emulator.setup.topology.contacts(peer)[1]
        asked = sorted(open_, key=lambda p: p not in near)[: joining.ASKED]
        size = 4 * emulator.setup.task.d
        begun = emulator.time + emulator.network.latency
        dues = {p: emulator.post.due(p, peer, size, begun) for p in asked}
        came = [p for p in asked if dues[p] < float("inf")]
        due = max((dues[p] for p in came), default=begun)
        emulator.at(due, peer, partial(self._arrive, peer, came))

    def _arrive(self, peer: PeerId, friends: list[PeerId]) -> None:
        """Let a peer begin from what its friends hold."""
        emulator = self._emulator
        setup, self._arriving = emulator.setup, self._arriving - {peer}
        friends = [p for p in friends if p in emulator.peers and p not in emulator.stopped]
        algorithm = setup.algorithm
        offers = [
            Offer(emulator.peers[p].round, algorithm.model(emulator.state(p))) for p in friends
        ]
        own = emulator.positions.get(peer)
        if own:
            own = own._replace(state=own.state.now())
        begin = setup.joined(peer, offers, own)
        if begin:
            begin = begin._replace(state=Later(algorithm, begin.state))
        emulator.enter(peer, begin)
        self.rosters.arrived(peer, friends)
