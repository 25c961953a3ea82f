"""What a peer has heard: mail it has not opened yet, and what it remembers of the senders."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Set
from functools import partial
from typing import Generic, NamedTuple, cast

from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, M, R, S, newest
from p2pfl.errors import RemoteProtocolError
from p2pfl.learning.tree import is_finite, tree_map
from p2pfl.peer.addressed import variant
from p2pfl.peer.events import PeerId, Received
from p2pfl.peer.ledger import Ledger, typed
from p2pfl.peer.letters import unstacked
from p2pfl.peer.plan import BACKLOG, Pace, View
from p2pfl.topology.mixing import Mixing

FAR = 4  # times the backlog: messages that there is room for where none may be dropped
ROOM = 1 << 26  # bytes of them that there is room for in any case


class Opened(NamedTuple, Generic[R]):
    """What was opened at the end of a round.

    Attributes:
        inbox: what there is to mix.
        received: bytes of the mail.
        scores: what each peer that was to be heard said in this very round; empty if nothing.
        stale: how many models were not of this round.
    """

    inbox: Inbox[R]
    received: int
    scores: dict[PeerId, list[float]]
    stale: int


def is_replaceable(algorithm: Algorithm[S, M, R]) -> bool:
    """Say whether the newest message of a sender says all that older ones do.

    Shares of a mass are sent as sums of all there were, see `ledger`.
    """
    return algorithm.absorb is newest


class Mail(Generic[S, M, R]):
    """The mail of one peer.

    Args:
        me: whose.
        algorithm: what is made of a message.
        mixing: what each sender counts.
        width: the number of parameters.
        pace: how many unopened messages of one sender there may be. Where patience is finite and
            only the newest counts, older ones are dropped. Else all are kept, and there is room for
            more before they are refused.
        exact: whether a message counts in its own round or never.

    Attributes:
        unopened: the messages of each sender, in order.
    """

    def __init__(
        self,
        me: PeerId,
        algorithm: Algorithm[S, M, R],
        mixing: Mixing,
        width: int,
        pace: Pace,
        exact: bool = False,
    ) -> None:
        self._me, self._algorithm, self._mixing, self._width = me, algorithm, mixing, width
        self._backlog = pace.backlog
        self._drops = pace.patience < math.inf and is_replaceable(algorithm)
        self._exact = exact
        self._ledger: Ledger[M] = Ledger()  # used where a mass is conserved
        self._kept = 1.0  # of a mass, when it was shared out last
        self._taken_back: list[tuple[PeerId, M]] = []  # of a mass, and to be mixed again
        self.unopened: dict[PeerId, deque[Received]] = defaultdict(deque)
        # The last rounds of which models were mixed.
        self._mixed: dict[PeerId, deque[int]] = defaultdict(partial(deque, maxlen=BACKLOG))
        self._newest: dict[PeerId, int] = {}
        self._heard: dict[PeerId, tuple[int, R]] = {}  # (degree, memory) of each sender
        self._outran: set[PeerId] = set()  # so far ahead that their mail overflowed

    def put(self, letter: Received, round: int) -> None:
        """Take in a message, during a round of one's own.

        Raises:
            RemoteProtocolError: it is out of order or cannot be decoded, or there is no room for
                it; nothing has changed.
        """
        sender = letter.sender
        if letter.round <= self._newest.get(sender, -1):
            raise RemoteProtocolError(f"{sender} sent round {letter.round} again, or out of order")
        most = max(FAR * self._backlog, ROOM // (letter.size or 1))
        if not self._drops and len(self.unopened.get(sender, ())) >= most:
            raise RemoteProtocolError(f"{sender} is too far ahead: there is no room for its model")
        if self._algorithm.absorb is not newest:
            self._try_absorb(letter)
        self._ledger.heard(sender)
        self._newest.pop(sender, None)  # who was heard last is to stand last
        self._newest[sender] = letter.round
        letters = self.unopened[sender]
        letters.append(letter)
        if self._drops and len(letters) > self._backlog:
            letters.popleft()
            self._outran.add(sender)
        elif self._drops and letter.round > round + self._backlog:
            self._outran.add(sender)  # what came between has been lost
        if letter.round <= round:
            self._outran.discard(sender)

    def _try_absorb(self, letter: Received) -> None:
        """Refuse a message that cannot be decoded now, while nothing has changed yet."""
        try:
            made = self._algorithm.absorb(None, cast(M, letter.message), self._width)
        except ValueError as error:
            raise RemoteProtocolError(f"message of {letter.sender}: {error}") from error
        if not all(map(is_finite, made)):  # of finite ones: a level times a unit may overflow
            raise RemoteProtocolError(f"message of {letter.sender}: numbers that are not finite")

    def newest(self, peer: PeerId) -> int:
        """Return the last round that a peer was heard in; -1: none."""
        return self._newest.get(peer, -1)

    @property
    def furthest(self) -> int:
        """The last round that anybody was heard in; -1: none."""
        return max(self._newest.values(), default=-1)

    def latest_rounds(self, count: int) -> list[int]:
        """Return in which rounds those spoke, so many, who were heard last; in ascending order."""
        return sorted([*self._newest.values()][-count:])

    def forget(self, peer: PeerId) -> None:
        """Expect nothing in particular of a peer any more: it begins anew."""
        self._newest.pop(peer, None)
        self._heard.pop(peer, None)
        self._outran.discard(peer)
        self._ledger.forget(peer)
        if self._mixing.conserves == "mass":
            self.unopened.pop(peer, None)  # sums of shares which are counted from nothing now

    def take_back(self, peer: PeerId) -> None:
        """Have again what a peer was given last, which is gone and never answered."""
        if share := self._ledger.take_back(peer):
            self._taken_back.append((peer, share))

    def said(
        self,
        view: View,
        round: int,
        places: tuple[PeerId, ...],
        message: tuple[Tensor, ...],
        doubted: Set[PeerId],
    ) -> list[tuple[tuple[PeerId, ...], tuple[Tensor, ...]]]:
        """Return what is sent to whom.

        All are told the same, but of a mass each has its share, and of a message with variants the
        one for its place among all `places`, which does not change when others are gone. Who is
        `doubted`, because it may be dead, is given nothing of a mass.
        """
        if self._algorithm.needs.addressed:
            each = ((peer, place) for place, peer in enumerate(places) if peer in view.sends_to)
            return [((peer,), variant(message, place)) for peer, place in each]
        if self._mixing.conserves != "mass":
            return [(view.sends_to, message)]
        return [((peer,), share) for peer, share in self._shares(view, round, message, doubted)]

    def _shares(
        self, view: View, round: int, message: tuple[Tensor, ...], doubted: Set[PeerId]
    ) -> Iterator[tuple[PeerId, tuple[Tensor, ...]]]:
        """Yield what to send to each peer in view, where a message is a mass to be shared out.

        Who may be dead, or has left shares unanswered, is told the old sum again, and its share is
        kept: all that we have would else go to those who are gone, or slow. Only who is to be
        heard can answer. Methods that need every message need every share.
        """
        degree, ledger = len(view.sends_to), self._ledger
        given = view.given or dict.fromkeys(view.sends_to, self._mixing.weight(degree, degree))
        weights = []
        for peer in view.sends_to:
            withheld = peer in doubted or ledger.owes(peer)
            weight = 0.0 if withheld and not self._algorithm.needs.every_message else given[peer]
            share = cast(M, tree_map(lambda part, weight=weight: part * weight, message))
            weights.append(weight)
            if weight and peer in view.hears_from:
                yield peer, ledger.lend(peer, share, self.newest(peer) >= round)
            else:
                yield peer, ledger.give(peer, share)
        self._kept = 1 - math.fsum(weights)

    def drop(self, sender: PeerId, rounds: range) -> list[Received]:
        """Take out and return what a sender has said in some rounds."""
        letters = self.unopened.get(sender, ())
        dropped = [one for one in letters if one.round in rounds]
        if dropped:
            self.unopened[sender] = deque(one for one in letters if one.round not in rounds)
        return dropped

    def disown(self, sender: PeerId, round: int) -> bool:
        """Take note that a sender did without us in a round; say whether we have mixed it then."""
        mixed = self._mixed.get(sender, deque())
        known = round in mixed
        if known:
            mixed.remove(round)  # it may say so again
        return known

    def has_come(self, peer: PeerId, round: int) -> bool:
        """Tell whether a sender need not be waited for: its message is here, or a newer one."""
        letters = self.unopened.get(peer)
        return bool(letters and letters[-1].round >= round) or peer in self._outran

    def remember(
        self, peer: PeerId, degree: int, message: tuple[Tensor, ...], fresh: bool = False
    ) -> tuple[int, R]:
        """Absorb a message, one's own too; return its sender's degree and what is remembered."""
        known = self._heard[peer][1] if peer in self._heard and not fresh else None
        memory = self._algorithm.absorb(known, cast(M, message), self._width)
        self._heard[peer] = (degree, memory)
        return degree, memory

    def open(self, view: View, round: int, everything: bool) -> Opened[R]:
        """Open what is due in a round, after `remember` has been told what was said oneself.

        Args:
            view: who was to be heard.
            round: up to which messages are due.
            everything: whether newer ones are, too.
        """
        entries = [(peer, 1.0, self._as_mine(share)) for peer, share in self._taken_back]
        self._taken_back = []
        mail = self._all_due(view.hears_from, round, everything)
        received, stale, taking = 0, 0, len(mail)
        # The weights of links are those of all who are heard in a round. With anybody else
        # they might add up to more than one.
        taken = view.taken if len(mail) == len(view.hears_from) else None
        shares = self._mixing.conserves == "mass"
        for peer, letters in mail.items():
            if not letters:
                continue
            for letter in letters:
                received += letter.size
                stale += letter.round != round
                message = self._taken(letter)
                if message is None:
                    continue
                degree, memory = self.remember(peer, letter.degree, message, letter.fresh)
                if shares:
                    entries.append((peer, 1.0, memory))
            self._mixed[peer].append(letters[-1].round)
            if not shares:  # a memory of who is silent would pull at us alone
                weight = taken[peer] if taken else self._mixing.weight(taking, degree)
                entries.append((peer, weight, memory))
        inbox = self._inbox(entries)
        if self._algorithm.absorb is newest:
            self._heard.clear()  # what was said before says nothing of later rounds
        said = {p: [one.score for one in mail[p] if one.round == round] for p in view.hears_from}
        return Opened(inbox, received, said, stale)

    def _taken(self, letter: Received) -> tuple[Tensor, ...] | None:
        """Return what a letter says; of a sum of shares what is new, if anything is."""
        if self._mixing.conserves != "mass":
            return letter.message
        new = self._ledger.take(letter.sender, cast(M, letter.message))
        return None if new is None else self._as_mine(new)

    def _as_mine(self, share: M) -> R:
        """Return a share in the type that we reckon in."""
        _, mine = self._heard[self._me]
        return cast(R, typed(share, cast(M, mine)))

    def _all_due(
        self, hears_from: tuple[PeerId, ...], round: int, everything: bool
    ) -> dict[PeerId, list[Received]]:
        """Take out what is due of those who are to be heard, and of whoever else has sent anything.

        Where neighbours change, a letter may come when its sender is none any more. It is taken
        now: later it would be old, and a share of a mass may not be lost.
        """
        mail = {peer: self._due(peer, round, everything) for peer in hears_from}
        for peer in () if self._exact else [p for p in self.unopened if p not in mail]:
            if letters := self._due(peer, round, everything):
                mail[peer] = letters
        return mail

    def _due(self, peer: PeerId, round: int, everything: bool) -> list[Received]:
        unopened, due = self.unopened.get(peer), list[Received]()
        if not unopened:
            return due
        everything = everything or (peer in self._outran and not self._exact)
        while unopened and (everything or unopened[0].round <= round):
            due.append(unopened.popleft())
        return due

    def _inbox(self, entries: list[tuple[PeerId, float, R]]) -> Inbox[R]:
        _, mine = self._heard[self._me]
        kept = self._kept
        if self._mixing.conserves == "mean":  # what was not heard goes back to oneself
            kept = 1 - math.fsum(weight for _, weight, _ in entries)
        # All peers add up in the order of the ids, so that peers which hear the same hold
        # the same, to the bit.
        entries = sorted([*entries, (self._me, kept, mine)], key=lambda entry: entry[0])
        senders, weights, memories = zip(*entries, strict=True)
        return unstacked(weights, memories, senders.index(self._me))
