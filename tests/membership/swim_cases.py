"""One peer, and what others say to it."""

from __future__ import annotations

from p2pfl.membership.members import Claim, Status, incarnation
from p2pfl.membership.messages import Kind, Message, decode, encode
from p2pfl.membership.swim import Swim
from p2pfl.membership.timers import Timers

BASE = incarnation(1)
ALIVE, SUSPECT, DEAD, LEFT = Status


def make(n=4, timers=Timers(), among=4096):  # noqa: B008 - a tuple
    """Return peer 0 of n, started at 0 s, who has heard from all others; `among` ids there are."""
    swim = Swim(0, BASE, timers, {k: f"tcp://h{k}:1" for k in range(1, n)}, 1, n=among)
    swim.start(0.0)
    for k in range(1, n):
        swim.hear(0.0, k, message(address=f"tcp://h{k}:1"))
    swim.letters()
    swim.changes()
    return swim


def message(kind=Kind.GOSSIP, *claims, number=0, target=0, said=BASE, round=0, address=""):
    return encode(Message(kind, number, target, said, round, address, claims))


def claim(peer, status, number=BASE, by=3, round=0, address=""):
    return Claim(peer, status, number, round, address, by)


def letters(swim):
    return [(to, decode(body)) for to, body in swim.letters()]


def changes(swim):
    return [(change.peer, change.status) for change in swim.changes()]


def run(swim, until, answering=()):
    """Let timers fire in time, while some answer what they are asked; return what was sent."""
    sent = []
    while (now := swim.due()) <= until:
        swim.tick(now)
        new = letters(swim)
        for to, body in new:
            if body.kind is Kind.PING and to in answering:
                said = swim.members[to].incarnation
                swim.hear(now, to, message(Kind.ACK, number=body.number, target=to, said=said))
        sent += new
    return sent
