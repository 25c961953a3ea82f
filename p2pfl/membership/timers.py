"""How often peers are looked after, and how long they are waited for."""

from __future__ import annotations

import math
from typing import NamedTuple


class Timers(NamedTuple):
    """Seconds, and a few counts, the same at all peers; `swim` says what they mean."""

    probe: float = 0.5
    timeout: float = 0.3
    indirect: int = 3
    suspicion_mult: int = 6
    suspicion_max: int = 4
    gossip: float = 0.1
    fanout: int = 3
    exchange: float = 10.0
    recontact: float = 5.0
    to_dead: float = 10.0
    tolerance: float = 0.25

    def check(self) -> None:
        """Raise `ValueError` if these timers make no sense."""
        for name, value in self._asdict().items():
            if isinstance(Timers._field_defaults[name], int) and type(value) is not int:
                raise ValueError(f"{name} = {value!r} is not an integer")
            if not 0 < value < math.inf:
                raise ValueError(f"{name} = {value} is not positive and finite")
        if self.timeout >= self.probe:
            raise ValueError(f"timeout = {self.timeout} is not below probe = {self.probe}")


def swim(  # noqa: PLR0913 - a section: every parameter is a key of the file
    probe: float = 0.5,
    timeout: float = 0.3,
    indirect: int = 3,
    suspicion_mult: int = 6,
    suspicion_max: int = 4,
    gossip: float = 0.1,
    fanout: int = 3,
    exchange: float = 10.0,
    recontact: float = 5.0,
    to_dead: float = 10.0,
    tolerance: float = 0.25,
) -> Timers:
    """Find out who is there by asking around (SWIM with the rules of Lifeguard).

    Times are seconds. The topology is then that of those who are there.

    Args:
        probe: between two probes; whoever has not answered by then is suspected.
        timeout: until others are asked to probe it as well.
        indirect: how many are asked.
        suspicion_mult: a suspect has at least this many probe intervals to object, times the
            decimal logarithm of the number of peers.
        suspicion_max: how many times as long if nobody else suspects it.
        gossip: between two rounds of gossip, while there is something to tell.
        fanout: how many hear each.
        exchange: between two exchanges of all that is known, with one peer.
        recontact: between two attempts at somebody who is dead.
        to_dead: for so long the dead hear gossip, which lets them object.
        tolerance: a timer that fires later than this means that we were frozen ourselves.
    """
    timers = Timers(
        probe=probe,
        timeout=timeout,
        indirect=indirect,
        suspicion_mult=suspicion_mult,
        suspicion_max=suspicion_max,
        gossip=gossip,
        fanout=fanout,
        exchange=exchange,
        recontact=recontact,
        to_dead=to_dead,
        tolerance=tolerance,
    )
    timers.check()
    return timers
