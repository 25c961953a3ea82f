"""Meeting the neighbours: where they are, who of them is there, and who is told about whom."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from p2pfl.errors import RemoteProtocolError, RunError, UserError
from p2pfl.membership.ration import Ration
from p2pfl.peer.events import PeerId
from p2pfl.runtime import finding, wire
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.finding import Book, Finder
from p2pfl.runtime.flows import Giving, Inflow
from p2pfl.runtime.handshake import Handshake, NeighbourGone
from p2pfl.runtime.neighbour import Neighbour
from p2pfl.runtime.sockets import Mail
from p2pfl.runtime.wire import Header, Kind

DIALS, EVERY = 16, 1.0  # times that a peer is dialled anew at once; seconds until once more
OTHER_RUN = "peers take part in another run: their experiments or seeds differ"


class Meeting:
    """The neighbours of a peer, from when they are looked for until they are gone.

    Args:
        me: who we are.
        endpoint: our sockets.
        neighbours: whom we talk to.
        awaited: who of them is there from the start.
        handshake: to be settled with them.
        book: who listens where, as far as we know; others may ask for it.
        finder: where else to look for addresses.

    Attributes:
        neighbours: those that have been dialled, and are not gone.
        giving: what each peer gets of us, whether we have dialled it or not.
        departed: who has said goodbye, and is not dialled any more.
        met: in which life those are who have said hello since all had met; to be taken out.
        prepare: called with every new one.
        undialled: how often a peer could not be dialled for want of room, and which.
    """

    def __init__(
        self,
        me: PeerId,
        endpoint: Endpoint,
        awaited: Iterable[PeerId],
        handshake: Handshake,
        book: Book,
        finder: Finder | None,
    ) -> None:
        self.me, self._endpoint, self._listener = me, endpoint, endpoint.listener
        self._book, self._finder, self._awaited = book, finder, frozenset(awaited)
        self.handshake = handshake
        self.neighbours: dict[PeerId, Neighbour] = {}
        self.giving: defaultdict[PeerId, Giving] = defaultdict(Giving)
        self._taking: defaultdict[PeerId, Inflow] = defaultdict(Inflow)
        self.departed: set[PeerId] = set()
        self.met: dict[PeerId, int] = {}
        self.prepare: Callable[[Neighbour], None] = lambda one: None
        self.undialled: Counter[str] = Counter()
        self._ration = Ration(DIALS, EVERY)
        self._useless: dict[PeerId, str] = {}  # why the address that was told is of no use
        self._elsewhere: set[PeerId] = set()  # peers of another run have asked for addresses

    def find(self) -> None:
        """Dial those whose address has become known, or is another than was thought.

        Raises:
            UserError: an address cannot be used, or no key is listed for its peer. What others
            have told is no mistake of ours, and only noted.
        """
        addresses = self.handshake.addresses
        elsewhere = [p for p, one in self.neighbours.items() if not one.link.welcomed]
        for peer in elsewhere:
            if self._finder and self.neighbours[peer].seems_wrong:
                self._finder.skip(peer, addresses[peer])
        unknown = self._awaited - addresses.keys()
        known = self._book.addresses
        if self._finder and (elsewhere or unknown):
            known = {**self._finder.found(), **known}
        for peer in elsewhere:
            if known.get(peer, addresses[peer]) != addresses[peer]:
                self.drop(peer)
                unknown |= {peer}
        for peer in sorted(unknown & known.keys()):
            self._try_out(peer, known[peer])

    def _try_out(self, peer: PeerId, address: str) -> None:
        """Dial a peer; an address that others have told may be of no use."""
        try:
            self._dial(peer, address)
        except UserError as error:
            if self._book.is_certain(peer):
                raise
            self._useless[peer] = str(error)

    def reach(self, peer: PeerId, address: str = "") -> Neighbour | None:
        """Return our way to a peer, which is dialled if there is none; None: it cannot be.

        Args:
            peer: whom to reach.
            address: where it says that it listens, if nobody else says where.
        """
        address = self._book.addresses.get(peer, address)
        known = peer in self.handshake.neighbours and peer not in self.departed
        if peer not in self.neighbours and known and address:
            self._dial_in_turn(peer, address)
        return self.neighbours.get(peer)

    def _dial_in_turn(self, peer: PeerId, address: str) -> None:
        """Dial a peer unless that was done again and again: anybody can say that it came back.

        If it cannot be now, whatever is to be told to it next is a reason to try again.
        """
        now = time.monotonic()
        if not self._ration.wait(now, peer):
            self._ration.take(now, peer)
            try:
                self._dial(peer, address)
            except UserError:  # a key that is revoked, an address beyond this machine
                pass
            except RunError as error:  # no room for another socket
                self.undialled[f"peer {peer}: {error}"] += 1

    def _dial(self, peer: PeerId, address: str) -> None:
        link = self._endpoint.dial(peer, address, self.handshake.hello)
        self.handshake.addresses[peer] = address
        giving = self.giving[peer]
        giving.guarded(link.is_guarded)
        one = self.neighbours[peer] = Neighbour(link, giving.outflow, self._taking[peer])
        self.prepare(one)

    def absent(self) -> list[PeerId]:
        """Return those who have not welcomed us, or been welcomed."""
        links = {peer: one.link for peer, one in self.neighbours.items()}
        there = [p for p in links if links[p].welcomed and self.handshake.is_known(p)]
        return sorted(self._awaited - set(there))

    def awaits(self, peer: PeerId) -> bool:
        """Say whether the run cannot begin without a peer: others may come late, or not at all."""
        return peer in self._awaited and (peer in self.neighbours or not self.handshake.done)

    def described(self, peer: PeerId) -> str:
        """Return what an error says of somebody who is absent."""
        one = self.neighbours.get(peer)
        trouble = one.link.trouble if one else self._useless.get(peer, "")
        if peer in self._elsewhere:
            trouble = "it takes part in another run"
        return f"{self.handshake.name(peer)}{f' ({trouble})' if trouble else ''}"

    def over(self) -> None:
        """Take note that all have met: nobody is looked for any more."""
        self.handshake.done = True
        if self._finder:
            self._finder.close()
            self._finder = None

    def hear(self, mail: Mail, header: Header) -> None:
        """Answer a hello.

        Raises:
            RemoteProtocolError: it was refused.
        """
        peer = header.sender
        another = self.handshake.hear(self._listener, mail, header, self.neighbours)
        if self.handshake.done:
            if another:  # what was under way to its last life is lost
                self.drop(peer)
                self.giving.pop(peer, None)
                self._taking.pop(peer, None)
            self.met[peer] = header.round
            self.departed.discard(peer)
            self.reach(peer)
        self.giving[peer].connected(mail.connection)

    def tell_addresses(self, mail: Mail, header: Header) -> None:
        """Answer somebody who looks for the others.

        Raises:
            RemoteProtocolError: it is none of us.
        """
        if not self.handshake.is_proven(header.sender, mail.key):
            raise RemoteProtocolError("a question for addresses with the key of somebody else")
        if header.run != self.handshake.run:
            self.handshake.refuse(self._listener, mail.connection, OTHER_RUN)
            if header.sender in self.handshake.neighbours:
                self._elsewhere.add(header.sender)
            raise RemoteProtocolError("a question for addresses from another run")
        told = finding.unpack(mail.frames[1:])
        self._book.learn({header.sender: told.get(header.sender, "")})
        about = wire.pack(Header(Kind.BOOK, self.handshake.run, 0, self.me))
        self._listener.answer(mail.connection, about, self._book.pack())

    def called_off(self, mail: Mail, header: Header, answer: bytes) -> None:
        """End because a neighbour gave up.

        Raises:
            NeighbourGone: in any case; it says why.
        """
        self.drop(header.sender)
        self._listener.answer(mail.connection, answer)
        reason = wire.reason(mail.frames[1:])
        raise NeighbourGone(
            f"peer {self.me}: peer {header.sender} gave up before all had met: {reason}"
        )

    def drop(self, peer: PeerId) -> None:
        """Close our link to a peer, if there is one."""
        if one := self.neighbours.pop(peer, None):
            one.inflow.end()
            one.inflow.broken()
            one.outflow.clear()
            self._endpoint.hang_up(one.link)

    def close(self) -> None:
        """Close everything."""
        for peer in list(self.neighbours):
            self.drop(peer)
        if self._finder:
            self._finder.close()
        self._endpoint.close()
