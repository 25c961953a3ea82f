"""The table of members, and the one rule by which what is said of them is believed.

Of any two claims about a member the one with the higher incarnation holds, and of two with the
same the graver one: ALIVE < SUSPECT < DEAD < LEFT. Only the member itself issues incarnations,
so only it can undo what was said of it, and all who have heard the same claims, in whatever
order, believe the same. Nobody but the member itself is believed an incarnation that lies out of
all reach, or a liar could name one that the member cannot outbid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

BOOT = 20  # bits of an incarnation that count what happens within one life
MOST_INCARNATION = 2**64 - 1
FAR = 2**62  # incarnations: 139 years, where lives are numbered by the milliseconds
MOST_ID = 2**31
MOST_ROUND = 2**53
MOST_ADDRESS = 200  # bytes
MOST_MEMBERS = 4096  # where it is not known how many peers there can be


class Status(IntEnum):
    """What is believed of a member; of the same incarnation the graver holds."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


def incarnation(boot: int) -> int:
    """Return the first incarnation of a life.

    Args:
        boot: higher in every life of a peer than in all before; at least 1.

    Raises:
        ValueError: it is out of range.
    """
    if not 1 <= boot <= MOST_INCARNATION >> BOOT:
        raise ValueError(f"boot = {boot} is not in 1..2^{64 - BOOT}-1")
    return boot << BOOT


def life_of(incarnation: int) -> int:
    """Return in which life of a peer an incarnation is: its `boot`."""
    return incarnation >> BOOT


class Claim(NamedTuple):
    """What somebody says of a member.

    Attributes:
        peer: the member.
        status: what it is said to be.
        incarnation: in which of its incarnations.
        round: how far it is said to be.
        address: where it listens; empty if that is not known.
        by: who says so first-hand: the member itself, or who accuses it.
    """

    peer: int
    status: Status
    incarnation: int
    round: int
    address: str
    by: int


@dataclass(frozen=True, slots=True)
class Member:
    """What is known of a peer.

    Attributes:
        id: which it is.
        status: what it is.
        incarnation: of which it was that; 0 before anything was heard of it.
        address: where it listens; empty if that is not known.
        round: how far it is, as far as we have heard.
        progressed_at: when that last grew, by our clock, in seconds.
        since: when its status last changed, by our clock, in seconds.
    """

    id: int
    status: Status
    incarnation: int
    address: str
    round: int
    progressed_at: float
    since: float


@dataclass(frozen=True, slots=True)
class Change:
    """A member has become something else, has begun another life, or listens elsewhere."""

    peer: int
    status: Status
    incarnation: int
    address: str


class Roster:
    """Everybody ever heard of. Who is gone stays listed, or a late message could revive it.

    Args:
        own: what we say of ourselves.
        others: addresses of those taken to be alive at the outset.

    Attributes:
        me: who we are.
        members: by id.
        changes: of others, in order, until somebody takes them out.
    """

    def __init__(self, own: Claim, others: Mapping[int, str]) -> None:
        first = [own] + [Claim(k, Status.ALIVE, 0, 0, others[k], k) for k in sorted(others)]
        self.members = {
            one.peer: Member(one.peer, one.status, one.incarnation, one.address, one.round, 0, 0)
            for one in first
        }
        self.me, self.changes = own.peer, list[Change]()
        self._first = own.incarnation
        self._live: tuple[int, ...] | None = None

    @property
    def live(self) -> tuple[int, ...]:
        """The ids of those who are ALIVE or SUSPECT, ascending."""
        if self._live is None:
            there = (one.id for one in self.members.values() if one.status <= Status.SUSPECT)
            self._live = tuple(sorted(there))
        return self._live

    @property
    def own(self) -> Member:
        """What we are ourselves."""
        return self.members[self.me]

    @property
    def others(self) -> list[int]:
        """The ids of the others who are live, ascending."""
        return [peer for peer in self.live if peer != self.me]

    @property
    def dead(self) -> list[Member]:
        """Those who are DEAD, not those who have left."""
        return [one for one in self.members.values() if one.status is Status.DEAD]

    @property
    def has_left(self) -> bool:
        """Whether we have left ourselves."""
        return self.own.status is Status.LEFT

    def reach(self, round: int) -> None:
        """Take note of how far we are ourselves."""
        self.members[self.me] = replace(self.own, round=round)

    def start(self, now: float) -> None:
        """Count from now for those known at the outset."""
        for peer, one in self.members.items():
            self.members[peer] = replace(one, progressed_at=now, since=now)

    def is_credible(self, claim: Claim, sender: int) -> bool:
        """Say whether a claim may be true, by its incarnation and by who says it.

        All lives of a run begin at about the same time, so one that is far off is made up. That
        includes the highest incarnation of all, which nobody could outbid. We object to more
        than others believe: their clocks may be ahead of ours.
        """
        if claim.peer == sender:
            return True
        if claim.peer == self.me:
            return claim.incarnation <= max(self._first + 2 * FAR, self.own.incarnation)
        return claim.incarnation <= self._first + FAR

    @property
    def is_misled(self) -> bool:
        """Whether we had to outbid an incarnation that is not of our life: somebody lies."""
        return life_of(self.own.incarnation) != life_of(self._first)

    def is_news(self, claim: Claim) -> bool:
        """Say whether a claim outbids what we believe."""
        known = self.members.get(claim.peer)
        if known is None:
            return True
        return (claim.incarnation, claim.status) > (known.incarnation, known.status)

    def believe(self, now: float, claim: Claim) -> None:
        """Believe a claim that is news."""
        peer, status, number, round, address, _ = claim
        known = self.members.get(peer)
        one = Member(peer, status, number, address, round, progressed_at=now, since=now)
        if known is not None:
            if not address:
                one = replace(one, address=known.address)
            if number >> BOOT == known.incarnation >> BOOT:
                one = replace(one, round=known.round, progressed_at=known.progressed_at)
            if status == known.status:
                one = replace(one, since=known.since)
        self.members[peer] = one
        if known is None or status != known.status:
            self._live = None
        if peer != self.me and (known is None or _is_other(one, known)):
            self.changes.append(Change(peer, status, number, one.address))

    def progress(self, now: float, claim: Claim) -> None:
        """Take note of how far a member is said to be in the life we know of."""
        known = self.members.get(claim.peer)
        if (
            known is not None
            and claim.round > known.round
            and claim.incarnation >> BOOT == known.incarnation >> BOOT
        ):
            self.members[claim.peer] = replace(known, round=claim.round, progressed_at=now)

    def claim(self, peer: int, by: int) -> Claim:
        """Return what we believe of a member, as a claim."""
        one = self.members[peer]
        return Claim(peer, one.status, one.incarnation, one.round, one.address, by)


def _is_other(one: Member, known: Member) -> bool:
    """Say whether a member is not as it was, beyond having objected to something."""
    then = (known.status, known.incarnation >> BOOT, known.address)
    return (one.status, one.incarnation >> BOOT, one.address) != then
