"""Reading: what comes in on all links is checked, and goes where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from typing import NamedTuple

import zmq

from p2pfl.errors import RemoteProtocolError
from p2pfl.peer.events import PeerId, Received, Skipped
from p2pfl.runtime import wire
from p2pfl.runtime.chunks import Damaged
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.lookout import Lookout
from p2pfl.runtime.meeting import Meeting
from p2pfl.runtime.neighbour import Neighbour
from p2pfl.runtime.quota import CLAIM, REFUSED, Quota
from p2pfl.runtime.sockets import MOST_FRAMES, Link, Mail
from p2pfl.runtime.wire import Header, Kind
from p2pfl.security.refusals import Refusals


class Asked(NamedTuple):
    """A peer that has come late asks for our model."""

    peer: PeerId


class Reader:
    """Reads the sockets of a peer.

    Args:
        endpoint: its sockets.
        meeting: its neighbours.
        about: the header of a small message of ours.

    Attributes:
        rejected: how many messages were refused, by sender and reason.
        heard: which peers have said anything lately, on a connection that is theirs.
        unusual: how many messages lately were neither credit nor chunks that others follow.
        is_training: whether it is too late to call the run off.
        lookout: takes in what is said of who is there; None: nobody does.
    """

    def __init__(
        self, endpoint: Endpoint, meeting: Meeting, about: Callable[[Kind], Header]
    ) -> None:
        self._endpoint, self._listener = endpoint, endpoint.listener
        self._meeting, self._handshake, self._about = meeting, meeting.handshake, about
        self.rejected = Refusals()
        self.heard: set[PeerId] = set()
        self.unusual = 0
        self.is_training = False
        self.lookout: Lookout | None = None
        self._quota = Quota()
        self._happened: list[Skipped | Asked] = []

    def reject(self, error: RemoteProtocolError, sender: PeerId | None = None) -> None:
        """Count a message that was refused; a neighbour that goes on like that is given up."""
        source = "a stranger" if sender is None else f"peer {sender}"
        self.rejected.note(source, f"{source}: {error}")
        if sender in self._meeting.neighbours:
            self._meeting.neighbours[sender].offend()

    def begin_anew(self) -> None:
        """Let what comes from now on be what has come lately."""
        self.heard.clear()
        self.unusual = 0

    def small(self) -> list[Skipped | Asked]:
        """Read what has come in from those who dialled us; return what concerns the rounds."""
        self._happened = []
        for mail in self._listener.read():
            sender = self._handshake.sender(mail.connection)
            self.unusual += 1  # until it turns out to be credit
            try:
                if not self._quota.spend(mail.connection):
                    self._endpoint.gate.cut(mail.descriptor, "too many messages")
                    raise RemoteProtocolError("too many messages")
                self._hear(mail, sender)
            except wire.OtherVersion as error:
                self._handshake.refuse(self._listener, mail.connection)
                self.reject(error, sender)
            except RemoteProtocolError as error:
                self._quota.spend(mail.connection, REFUSED)
                self.reject(error, sender)
        return self._happened

    def _hear(self, mail: Mail, sender: PeerId | None) -> None:
        """Take in a small message."""
        if not 0 < len(mail.frames) <= MOST_FRAMES:
            raise RemoteProtocolError("a message of no frames, or of too many")
        header = wire.unpack(mail.frames[0])
        if header.kind is Kind.HELLO:
            self._meeting.hear(mail, header)
            self.heard.add(header.sender)
        elif header.kind is Kind.WHERE:
            self._meeting.tell_addresses(mail, header)
        elif sender is None or (header.sender, header.run) != (sender, self._handshake.run):
            raise RemoteProtocolError("a message from somebody who has not said hello")
        else:
            self._hear_from(sender, mail, header)

    def _hear_from(self, sender: PeerId, mail: Mail, header: Header) -> None:
        self.heard.add(sender)
        one = self._meeting.neighbours.get(sender)
        if header.kind is Kind.ABORT and not self.is_training and self._meeting.awaits(sender):
            self._meeting.called_off(mail, header, wire.pack(self._about(Kind.BYE)))
        elif header.kind is Kind.MEMBERS:
            self._hear_of_members(sender, mail)
        elif header.kind is Kind.SKIP:
            self._happened.append(Skipped(sender, header.round, bool(header.degree)))
        elif header.kind is Kind.PULL:
            self._happened.append(Asked(sender))
        elif header.kind is Kind.CREDIT:
            self._meeting.giving[sender].asked(mail.connection, header)
            self.unusual -= 1
        elif one:
            one.hear(mail.connection, header, self._about(Kind.PONG))
        elif header.kind in (Kind.BYE, Kind.ABORT):
            self._listener.answer(mail.connection, wire.pack(self._about(Kind.BYE)))

    def _hear_of_members(self, sender: PeerId, mail: Mail) -> None:
        if len(mail.frames) != 2:
            raise RemoteProtocolError("a message about members without any")
        self._quota.spend(mail.connection, len(mail.frames[1]) / CLAIM)
        if self.lookout:
            self.lookout.hear(sender, mail.frames[1])

    def models(self, readable: Container[zmq.Socket[bytes]]) -> list[Received]:
        """Read what has come on the links we dialled, as far as `readable`; return the models."""
        arrived: list[Received | None] = []
        for peer, one in list(self._meeting.neighbours.items()):
            if one.link.last_words:
                self._hear_last_words(peer, one.link)
            if one.link.socket in readable:
                self.heard.add(peer)
                arrived += self._read(peer, one)
        return [one for one in arrived if one]

    def _hear_last_words(self, peer: PeerId, link: Link) -> None:
        """Take in a refusal that lay unread when its connection was lost, and nothing else."""
        first, *body = link.last_words
        link.last_words = []
        with suppress(RemoteProtocolError):  # it was cut off
            header = wire.unpack(first)
            if header.kind is Kind.REFUSE:
                self._handshake.hear_answer(peer, link, header, body)

    def _read(self, peer: PeerId, one: Neighbour) -> Iterator[Received | None]:
        for frames in one.link.read():
            self.unusual += 1
            try:
                header = wire.unpack(frames[0])
                if header.kind in (Kind.CHUNK, Kind.ANEW):
                    self._check_origin(peer, one, header)
                    yield one.inflow.take(header, frames[1:])
                    one.ask(self._about)  # now, so that the next are on their way
                    self.unusual -= one.inflow.is_midway
                elif self._handshake.hear_answer(peer, one.link, header, frames[1:]):
                    self._meeting.drop(peer)  # our own goodbye has been read
                    break
            except Damaged as error:
                self.reject(error, peer)
                self._endpoint.dial_again(one.link)
                break
            except wire.OtherVersion as error:
                self._handshake.hear_version(peer, error)
                self.reject(error, peer)
            except RemoteProtocolError as error:
                self.reject(error, peer)

    def _check_origin(self, peer: PeerId, one: Neighbour, header: Header) -> None:
        if (header.sender, header.run) != (peer, self._handshake.run) or not one.link.welcomed:
            raise RemoteProtocolError("a chunk from somebody else")
