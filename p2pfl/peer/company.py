"""Whom a peer reckons with: who is there, whom it waits for, and whose rounds it leaves out.

Waiting and dying are two things. A neighbour that is suspected, or has missed a deadline, is
not waited for, which costs little and is undone by a word of it. Only who is down is left
out of the topology.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from p2pfl.peer.events import PeerDown, PeerId, PeerSuspected, PeerUp
from p2pfl.peer.plan import BACKLOG

REMEMBERED = 64  # rounds: further apart than that peers are only on long one-way rings
RETURNED = -1  # the round of a deadline that was not missed, but cannot be expected to be met
LAGGING = 3  # deadlines that a peer has to miss running to count as slow


class Company:
    """The others, as one peer sees them.

    Args:
        leaps: whether who is behind catches up by leaving out rounds.
        gap: for how many rounds those who are done keep their place. Where all wait for each other,
            all are soon done; and each would forget them in another round.

    Attributes:
        gone: who has left, or is presumed dead.
    """

    def __init__(self, leaps: bool = False, gap: float = BACKLOG) -> None:
        self._leaps, self._gap = leaps, gap
        self.gone: frozenset[PeerId] = frozenset()
        self._done: dict[PeerId, float] = {}  # up to which round they keep their place
        self._suspected: set[PeerId] = set()
        self._late: dict[PeerId, int] = {}  # the last deadline missed by who has not caught up
        # In which round each was last heard too late, and how many that was before ours.
        self._behind: dict[PeerId, tuple[int, int]] = {}
        self._misses: Counter[PeerId] = Counter()  # how many it has missed since it was in step
        self._left_out: dict[PeerId, deque[int]] = {}  # the last rounds in which we do not count
        self._alone: dict[PeerId, deque[int]] = {}  # those in which only we do

    def note(self, event: PeerUp | PeerSuspected | PeerDown, round: int) -> None:
        """Take note, in a round, of who is there for certain, perhaps, or not any more."""
        match event:
            case PeerUp(peer=peer):
                self._done.pop(peer, None)
                if peer in self.gone:  # it may not have come to our round yet, or be beyond it
                    self._late[peer] = RETURNED
                self.gone -= {peer}
                self._suspected.discard(peer)
            case PeerSuspected(peer=peer):
                self._suspected.add(peer)
            case PeerDown(peer=peer, done=done):
                self.gone |= {peer}
                if done:
                    self._done[peer] = round + self._gap
                self._suspected.discard(peer)
                self._late.pop(peer, None)
                self._behind.pop(peer, None)
                self._misses.pop(peer, None)
                self._left_out.pop(peer, None)
                self._alone.pop(peer, None)

    def absent(self, round: int) -> frozenset[PeerId]:
        """Return who has no place among the others in a round.

        Who is done leaves a gap at first: others in their last rounds would else change their
        neighbours, one after the other, for nothing.
        """
        if not self._done:
            return self.gone
        return frozenset(p for p in self.gone if self._done.get(p, -1) < round)

    def missed(self, peers: Iterable[PeerId], round: int) -> None:
        """Take note of who was not heard in a round: late is who should have been."""
        due = [p for p in peers if self.is_there(p) and not self.is_left_out(p, round)]
        self._late.update(dict.fromkeys(due, round))
        self._misses.update(due)

    def lags(self, peer: PeerId) -> bool:
        """Say whether a peer is not late for once, but too slow for the others."""
        return self._misses.get(peer, 0) >= LAGGING

    def in_time(self, peer: PeerId, round: int, before: int) -> None:
        """Take note that a peer was in time in a round, having spoken last in the round `before`.

        Who was late is in step again. But one that is slow is in time whenever it has leapt, and
        no reason to wait: where peers leap it must be so twice running, or have missed a single
        deadline, and that by little.
        """
        self._behind.pop(peer, None)
        missed = self._late.get(peer, round)
        if not self._leaps or before > missed or (round == missed and before == missed - 1):
            self._late.pop(peer, None)
            self._misses.pop(peer, None)

    def behind(self, peer: PeerId, round: int, by: int, alone: bool) -> None:
        """Take note that a peer has spoken in a round that is so many before ours.

        Who goes from round to round and does not fall further behind is not slow, only apart
        from us: we did not wait for each other for a while. It is waited for until it has come.
        But who does not leap may be long in coming, so only who waits for nobody, and is `alone`,
        waits for it: others are not held up a second time.
        """
        before, far = self._behind.get(peer, (-1, 0))
        if (self._leaps or alone) and round == before + 1 and by <= min(far, BACKLOG):
            self._late.pop(peer, None)
            self._misses.pop(peer, None)
        self._behind[peer] = round, by

    def leave_out(self, peer: PeerId, round: int) -> None:
        """Take note that a peer counts nothing of ours in a round, nor do we of its."""
        self._left_out.setdefault(peer, deque(maxlen=REMEMBERED)).append(round)

    def is_left_out(self, peer: PeerId, round: int) -> bool:
        """Say whether what a peer says in a round is not to be counted."""
        return round in self._left_out.get(peer, ())

    def has_been_left_out(self, since: int) -> bool:
        """Say whether anybody has done without us in a round from `since` on."""
        told = [*self._left_out.values(), *self._alone.values()]
        return any(round >= since for rounds in told for round in rounds)

    def count_alone(self, peer: PeerId, round: int) -> None:
        """Take note that a peer counts nothing of ours in a round, while we may of its."""
        self._alone.setdefault(peer, deque(maxlen=BACKLOG)).append(round)

    def counts_alone(self, peer: PeerId, round: int) -> bool:
        """Say whether only one of us counts the other in a round."""
        return round in self._alone.get(peer, ())

    def is_there(self, peer: PeerId) -> bool:
        """Say whether a peer is taken to be there, without any doubt."""
        return peer not in self.gone and peer not in self._suspected

    def has_returned(self, peer: PeerId) -> bool:
        """Say whether a peer has come back, and may still be in another round than we."""
        return self.is_there(peer) and self._late.get(peer) == RETURNED

    def is_waited_for(self, peer: PeerId, round: int) -> bool:
        """Say whether a round is not to end without a word of this peer, while there is time."""
        late = peer in self._late or self.is_left_out(peer, round)
        return self.is_there(peer) and not late
