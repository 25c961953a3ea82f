"""A peer's own end of all its links: where it listens, whom it dials, and what guards both."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

import zmq

from p2pfl.addresses import is_address, is_loopback
from p2pfl.errors import UserError
from p2pfl.peer.events import PeerId
from p2pfl.runtime.sockets import Dialling, Frames, Link, Listener, new_context
from p2pfl.security.gate import Gate
from p2pfl.security.keys import KeyPair
from p2pfl.security.selftest import check_listener


class Keyring(NamedTuple):
    """Our own keys, and the public ones of everybody who may take part."""

    own: KeyPair
    of: Mapping[PeerId, str]


class Endpoint:
    """The sockets of one peer.

    Args:
        bind: where it listens.
        links: how many others it dials.
        keyring: what both ends of every link prove; None: links are in clear.
        descriptor: a socket that listens already, to be taken over.
        insecure: whether links may be in clear beyond this machine.

    Attributes:
        listener: on which others dial us.
        gate: which guards all sockets.
        poller: wakes up when there is something to do here.

    Raises:
        UserError: the address cannot be used.
        RunError: the address is taken, or strangers could come in.
    """

    def __init__(
        self,
        bind: str,
        links: int,
        keyring: Keyring | None = None,
        descriptor: int | None = None,
        insecure: bool = False,
    ) -> None:
        self.keyring, self.poller, self._insecure = keyring, zmq.Poller(), insecure
        self._links: dict[int, Link] = {}
        self._numbers = itertools.count()
        own, allowed = (keyring.own, keyring.of.values()) if keyring else (None, ())
        with ExitStack() as undo:
            self.context = new_context(links)
            undo.callback(self.context.destroy)
            most = {"most": 2 * links + 64, "strangers": max(64, links)}
            self.gate = Gate(self.context, allowed, **most)
            undo.callback(self.gate.close)
            self.listener = Listener(self.context, self.gate, bind, own, descriptor)
            undo.callback(self.listener.socket.close)
            if own:
                check_listener(self.listener.address, own.public)
                self.gate.forgive()
            undo.pop_all()
        self.poller.register(self.listener.socket, zmq.POLLIN)
        self.poller.register(self.gate.fileno(), zmq.POLLIN)

    def dial(self, peer: PeerId, address: str, hello: Frames) -> Link:
        """Dial a peer; `hello` goes out first on every connection.

        Raises:
            UserError: it is no address, no key is listed for the peer, or the link would be in
                clear beyond this machine.
            RunError: the process may open no more files.
        """
        to = Dialling(address)
        if not is_address(address):
            raise UserError(f"cannot dial {address}, which is no address")
        if not (self.keyring or self._insecure or is_loopback(address)):
            raise UserError(f"peer {peer} is at {address}, beyond this machine: that needs keys")
        if self.keyring:
            if peer not in self.keyring.of:
                raise UserError(f"no key is listed for peer {peer}")
            to = Dialling(address, self.keyring.own, self.keyring.of[peer])
        link = Link(self.context, self.gate, next(self._numbers), to, hello)
        self._follow(link)
        return link

    def tend(self) -> bool:
        """Tell the links what has happened to them, and dial again where we were turned away.

        Return whether anything has happened.
        """
        news = self.gate.news()
        for one in news:
            if link := self._links.get(one.link):
                link.happened(one.event)
        for link in [one for one in self._links.values() if one.is_given_up()]:
            self.dial_again(link)
        return bool(news)

    def dial_again(self, link: Link) -> None:
        """Make a connection anew; what was on its way is lost."""
        self._leave(link)
        link.dial_again(next(self._numbers))  # what is yet to be heard of the last is not of this
        self._follow(link)

    def hang_up(self, link: Link) -> None:
        """Close a link; what was not sent is lost."""
        self._leave(link)
        link.close()

    def _follow(self, link: Link) -> None:
        self._links[link.number] = link
        self.poller.register(link.socket, zmq.POLLIN)

    def _leave(self, link: Link) -> None:
        del self._links[link.number]
        self.poller.unregister(link.socket)

    def allow(self, keys: Mapping[PeerId, str]) -> None:
        """Take in a new list of keys; connections of a key that is gone are cut."""
        assert self.keyring is not None
        self.keyring = self.keyring._replace(of=dict(keys))
        self.gate.allow(keys.values())

    def close(self) -> None:
        """Close all sockets, those of the gate last: it is another thread that uses them."""
        for link in self._links.values():
            link.close()
        self.listener.socket.close()
        self.gate.close()
        self.context.destroy()
