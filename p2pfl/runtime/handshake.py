"""The handshake: whom a peer lets in, who lets it in, and why not.

A hello says who dials, and spells out what both ends must agree on. The answer is WELCOME,
or REFUSE with the difference. With keys, who says hello must have proved the key of the peer
it says it is; in clear, a hello is a claim and nothing more.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from p2pfl.errors import RemoteProtocolError, RunError
from p2pfl.peer.events import PeerId
from p2pfl.runtime import wire
from p2pfl.runtime.sockets import Frames, Link, Listener, Mail
from p2pfl.runtime.wire import MOST_REASON, Header, Kind

STARTED_LATER = "that was started later"


class NeighbourGone(RunError):
    """A neighbour gave up before training had begun, for a reason of its own."""


@dataclass(frozen=True)
class Terms:
    """What both ends of a link must agree on, spelled out so that a difference has a name."""

    items: Mapping[str, str]

    @property
    def run(self) -> bytes:
        """The digest which stands for the terms in every header."""
        return wire.digest(self.items)


class Handshake:
    """What has been settled with the neighbours.

    Args:
        me: who we are.
        neighbours: whom to let in.
        terms: what both ends must agree on.
        keys: what each peer must prove; None: nothing.
        life: tells us from ourselves started again: a later life has a larger number.
        returns: whether peers may come back, or come late.

    Attributes:
        neighbours: whom we let in.
        addresses: where they listen, as far as it is known.
        run: stands for our terms in every header.
        refused: who does not want us, and why.
        answered: whose hello we have answered, either way.
        done: whether all have met.
        is_late: whether the others had met before we came.
        lives: in which life each of those is that has been let in.
    """

    def __init__(
        self,
        me: PeerId,
        neighbours: Iterable[PeerId],
        terms: Terms,
        keys: Mapping[PeerId, str] | None = None,
        life: int = 0,
        returns: bool = False,
    ) -> None:
        self.me, self.run = me, terms.run
        self.is_late, self._returns = False, returns
        self.addresses: dict[PeerId, str] = {}
        self.neighbours, self._keys = frozenset(neighbours), keys
        self.refused: dict[PeerId, str] = {}
        self.answered: set[PeerId] = set()
        self.done = False
        self._terms = wire.shorten(terms.items)
        self._life = life or secrets.randbits(53)
        self.lives: dict[PeerId, int] = {}
        self._senders: dict[bytes, PeerId] = {}  # by connection

    @property
    def hello(self) -> Frames:
        """What goes out first on every connection we dial."""
        return [self._header(Kind.HELLO, self._life), wire.pack_terms(self._terms)]

    def sender(self, identity: bytes) -> PeerId | None:
        """Return who is behind a connection; None: nobody who has said hello."""
        return self._senders.get(identity)

    def is_known(self, peer: PeerId) -> bool:
        """Return whether a peer has been let in."""
        return peer in self.lives

    def name(self, peer: PeerId) -> str:
        """Return what errors call a neighbour."""
        return f"peer {peer} at {self.addresses.get(peer, 'an unknown address')}"

    def hear(
        self, listener: Listener, mail: Mail, header: Header, here: Collection[PeerId]
    ) -> bool:
        """Answer a hello; return whether it is of another process than the one before.

        Args:
            listener: where it came in, and where the answer goes.
            mail: the message; `header` is its first frame.
            here: neighbours that have not left.

        Raises:
            RemoteProtocolError: it was refused.
        """
        if len(mail.frames) != 2:
            raise RemoteProtocolError("a hello without terms")
        peer, life, identity = header.sender, header.round, mail.connection
        reason = self._imposture(peer, mail.key) or self._objection(
            listener, header, wire.unpack_terms(mail.frames[1]), here
        )
        if peer in self.neighbours:
            self.answered.add(peer)
        if reason:
            self.refuse(listener, identity, reason)
            raise RemoteProtocolError(f"hello refused: {reason}")
        # Of a connection before this one something may still lie unread, if it was not
        # another process that made it.
        before = [old for old, whose in self._senders.items() if whose == peer]
        known = self.lives.get(peer)
        listener.make_way(mail, peer)
        if known not in (None, life):
            for old in before:
                self.refuse(listener, old, f"a process {STARTED_LATER} takes part as peer {peer}")
        for old in before[:-1] if known == life else before:
            del self._senders[old]
        self._senders[identity], self.lives[peer] = peer, life
        late = self._returns and self.done and known != life
        listener.answer(identity, self._header(Kind.WELCOME, int(late)))
        return known not in (None, life)

    def refuse(self, listener: Listener, identity: bytes, reason: str = "") -> None:
        """Answer with a no, and say why if the other end could read that."""
        listener.answer(identity, self._header(Kind.REFUSE), reason.encode()[:MOST_REASON])

    def allow(self, keys: Mapping[PeerId, str]) -> list[PeerId]:
        """Take in a new list of keys; return who has lost theirs, whose mail is refused now."""
        before, self._keys = self._keys or {}, keys
        lost = [peer for peer, key in before.items() if keys.get(peer) != key]
        self._senders = {i: peer for i, peer in self._senders.items() if peer not in lost}
        return lost

    def is_connected(self, listener: Listener, peer: PeerId) -> bool:
        """Try whether anybody is there who was let in as this peer."""
        welcome = self._header(Kind.WELCOME)
        return any(listener.answer(i, welcome) for i, p in self._senders.items() if p == peer)

    def is_proven(self, peer: PeerId, key: str | None) -> bool:
        """Say whether a key is that of a peer; without keys everybody is believed."""
        return self._keys is None or (key is not None and self._keys.get(peer) == key)

    def hear_version(self, peer: PeerId, error: wire.OtherVersion) -> None:
        """Take note that a neighbour speaks another version of the protocol."""
        self.refused[peer] = f"{self.name(peer)} speaks {error}"
        self.answered.add(peer)  # there is nothing more it could hear from us

    def hear_answer(self, peer: PeerId, link: Link, header: Header, body: list[memoryview]) -> bool:
        """Take in what the neighbour behind a link has answered; return whether it has left.

        Raises:
            RemoteProtocolError: it is no answer.
        """
        if header.sender != peer:
            self.refused[peer] = f"{self.name(peer)} says that it is peer {header.sender}"
            self.answered.add(peer)
        elif header.kind is Kind.REFUSE:
            self.refused[peer] = (
                f"{self.name(peer)} refused peer {self.me} ('here' is peer {peer}):"
                f" {wire.reason(body)}"
            )
        elif header.kind not in (Kind.WELCOME, Kind.BYE) or header.run != self.run:
            raise RemoteProtocolError(f"an unexpected {header.kind.name}")
        elif header.kind is Kind.WELCOME:
            self.is_late |= bool(header.round) and not self.done
            self.refused.pop(peer, None)
            link.accepted()
        return header.sender == peer and header.kind is Kind.BYE

    def _imposture(self, peer: PeerId, key: str | None) -> str:
        if self.is_proven(peer, key):
            return ""
        return f"the key of this connection is not the one that is listed for peer {peer}"

    def _objection(
        self,
        listener: Listener,
        header: Header,
        terms: Mapping[str, str],
        here: Collection[PeerId],
    ) -> str:
        """Say why a hello is not acceptable, or return the empty string."""
        peer, life = header.sender, header.round
        if difference := wire.difference(self._terms, terms):
            return difference
        if peer not in self.neighbours:
            return f"peer {peer} is no neighbour of peer {self.me}"
        if self.done and not self._returns and peer not in here:
            return f"peer {self.me} goes on without peer {peer}"
        before = self.lives.get(peer, life)
        if before == life:
            return ""
        if self._returns and self.done:  # of two the later goes on, and the other hears of it
            return "" if life > before else f"there is a peer {peer} already"
        if self.is_connected(listener, peer):
            return f"there is a peer {peer} already"
        return f"peer {peer} was started again after the run had begun" if self.done else ""

    def _header(self, kind: Kind, round: int = 0) -> bytes:
        return wire.pack(Header(kind, self.run, 0, self.me, round))
