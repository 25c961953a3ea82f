"""Finding the others: where they listen, when all that is known is the address of one.

Who needs to know asks that one, which is itself a peer of the run, and tells it its own
address in the same breath. An address is only a hint: who is there shows in the handshake.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from p2pfl.addresses import is_tcp
from p2pfl.errors import RemoteProtocolError, UserError
from p2pfl.peer.events import PeerId
from p2pfl.runtime import wire
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.sockets import Frames, Link
from p2pfl.runtime.wire import Header, Kind

ASK_EVERY = 0.3  # seconds
MOST_ADDRESS = 200  # characters
ENTRY = 12  # bytes of an entry besides the address
MOST_TOLD = 50_000  # bytes of a book, which travels as one message


class Finder(Protocol):
    """A source of addresses."""

    def found(self) -> Mapping[PeerId, str]:
        """Return where peers of this run listen, as far as is known. Never waits."""

    def skip(self, peer: PeerId, address: str) -> None:
        """Take note that somebody else listens there."""

    def close(self) -> None:
        """Stop looking."""


class Book:
    """What one peer knows of who listens where.

    Args:
        nodes: how many peers there are: others are not written down.
        addresses: what is known for certain, and not changed by what others say.
    """

    def __init__(self, nodes: int, addresses: Mapping[PeerId, str]) -> None:
        self.nodes, self._certain = nodes, dict(addresses)
        self._told: dict[PeerId, str] = {}

    def is_certain(self, peer: PeerId) -> bool:
        """Say whether we know ourselves where a peer listens, and were not only told so."""
        return peer in self._certain

    @property
    def addresses(self) -> dict[PeerId, str]:
        """Everybody's address, as far as it is known."""
        return {**self._told, **self._certain}

    def learn(self, addresses: Mapping[PeerId, str]) -> None:
        """Write down what somebody says; the newest is kept.

        Raises:
            RemoteProtocolError: it is no address, or of nobody who takes part, or too much.
        """
        for peer, address in addresses.items():
            if not 0 <= peer < self.nodes:
                raise RemoteProtocolError(f"an address of peer {peer}, who takes no part")
            if not is_tcp(address) or len(address) > MOST_ADDRESS:
                raise RemoteProtocolError("an address which is none")
            told = {**self._told, peer: address}
            if sum(len(one) + ENTRY for one in told.values()) > MOST_TOLD:
                raise RemoteProtocolError("more addresses than a book holds")
            self._told = told

    def pack(self) -> bytes:
        """Return the body of a BOOK, which holds as much as there is room for."""
        room, some = MOST_TOLD, {}
        for peer, address in self.addresses.items():
            room -= len(address) + ENTRY
            if room >= 0:
                some[peer] = address
        return pack(some)


def pack(addresses: Mapping[PeerId, str]) -> bytes:
    """Return addresses as they travel."""
    return wire.pack_terms({str(peer): address for peer, address in addresses.items()})


def unpack(body: list[memoryview]) -> dict[PeerId, str]:
    """Return the addresses in a message.

    Raises:
        RemoteProtocolError: there are none.
    """
    if len(body) != 1:
        raise RemoteProtocolError("a message without addresses")
    found = wire.unpack_terms(body[0])
    if not all(peer.isascii() and peer.isdecimal() and len(peer) < 10 for peer in found):
        raise RemoteProtocolError("addresses of nobody")
    return {int(peer): address for peer, address in found.items()}


class Contact:
    """Asks one peer for the addresses of all.

    Args:
        endpoint: where the link was dialled.
        link: to that peer, whose hello is the question.
        address: where it leads, for error messages.
        question: the frames of a WHERE.
        nodes: how many peers there are.
    """

    def __init__(
        self, endpoint: Endpoint, link: Link, address: str, question: Frames, nodes: int
    ) -> None:
        self._endpoint, self._link = endpoint, link
        self._address, self._question = address, question
        self._asked = 0.0
        self._book = Book(nodes, {})

    def found(self) -> Mapping[PeerId, str]:
        """Return what that peer has said so far, and ask it again now and then.

        Raises:
            UserError: it does not take part in this run.
        """
        now = time.monotonic()
        if now > self._asked + ASK_EVERY and not self._link.unsent:
            self._asked = now
            self._link.unsent.append(self._question)
        self._link.flush()
        for frames in self._link.read():
            try:
                header = wire.unpack(frames[0])
                if header.kind is Kind.REFUSE:
                    raise UserError(f"{self._address} cannot help: {wire.reason(frames[1:])}")
                if header.kind is Kind.BOOK:
                    self._link.accepted()
                    self._book.learn(unpack(frames[1:]))
            except RemoteProtocolError as error:
                raise UserError(f"{self._address} is no peer of this run: {error}") from error
        return self._book.addresses

    def skip(self, peer: PeerId, address: str) -> None:
        """Do nothing: there is one address of each."""

    def close(self) -> None:
        """Hang up."""
        self._endpoint.hang_up(self._link)


def ask(endpoint: Endpoint, who: tuple[PeerId, str], me: PeerId, book: Book, run: bytes) -> Contact:
    """Return a `Contact` that asks a peer, given its id and address, from our endpoint.

    Raises:
        UserError: it is no address, or no key is listed for that peer.
    """
    peer, address = who
    mine = {me: book.addresses[me]}
    question = [wire.pack(Header(Kind.WHERE, run, 0, me)), pack(mine)]
    link = endpoint.dial(peer, address, question)
    return Contact(endpoint, link, address, question, book.nodes)
