"""What must hold of every peer after every event."""

from __future__ import annotations

from p2pfl.membership.members import Status
from p2pfl.membership.probing import MOST_HEALTH


class Broken(AssertionError):
    pass


class Watch:
    """Looks at a peer after each event, and remembers what it believed before."""

    def __init__(self, cluster, timers):
        self.cluster, self.timers = cluster, timers
        self.issued = {}  # the highest incarnation of each peer, over all its lives
        self.believed = {}  # what is held of each member, by peer and life
        self.letters = {}  # how many it had written when it left, by peer and life
        self.suspected = {}  # when somebody first suspected a peer in an incarnation, or any below
        self.reached = set()
        self._seen = 0
        cluster.after = self.look

    def look(self, peer):
        process = self.cluster.processes[peer]
        swim, life = process.swim, (peer, process.boot)
        own = swim.members[peer]
        self.issued[peer] = max(self.issued.get(peer, 0), own.incarnation)
        self.look_at_members(peer, swim, self.believed.setdefault(life, {}))
        self.look_at_bounds(peer, swim)
        self.look_at_verdicts()
        if own.status is Status.LEFT:
            written = swim.statistics.messages
            self.require(
                self.letters.setdefault(life, written) == written and not swim.letters(),
                f"I11 {peer} goes on after it has left",
            )
        else:
            self.require(own.status is Status.ALIVE, f"I3 {peer} believes itself {own.status!r}")
        self.take_note(swim.statistics)

    def look_at_members(self, peer, swim, before):
        self.require(before.keys() <= swim.members.keys(), f"{peer} forgot somebody")
        for k, one in swim.members.items():
            known = before.get(k)
            if known is one:
                continue
            before[k] = one
            self.require(
                one.incarnation <= self.issued.get(k, 0),
                f"I2 {peer} believes {one.incarnation} of {k}, who has issued {self.issued.get(k)}",
            )
            if known is not None:
                self.require(
                    one.incarnation >= known.incarnation, f"I1 {k} went back at {peer}: {one}"
                )
                self.require(
                    one.incarnation > known.incarnation or one.status >= known.status,
                    f"I4 {k} went from {known.status!r} to {one.status!r} at {peer} by itself",
                )
                if known.status is Status.DEAD and one.status is Status.ALIVE:
                    self.reached.add("back from the dead")

    def look_at_bounds(self, peer, swim):
        n, prober = len(swim.members), swim._prober
        self.require(
            len(prober.probes) <= n
            and len(prober.relays) <= 256
            and len(swim._teller._rumours) <= n
            and len(swim._suspicions) <= n
            and len(swim._alarms) <= 8 + 4 * n + len(prober.relays)
            and len(swim._alarms._heap) <= 2 * len(swim._alarms) + 100 + 4 * n,
            f"I6 {peer} remembers without bound",
        )
        held = {k for k, one in swim.members.items() if one.status is Status.SUSPECT}
        self.require(swim._suspicions.keys() == held, f"I6 suspicions of {peer} are not those held")
        self.require(0 <= prober.health <= MOST_HEALTH, f"I6 health {prober.health} of {peer}")

    def look_at_verdicts(self):
        log = self.cluster.log
        for time, observer, change in log[self._seen :]:
            key = change.peer, change.incarnation
            if change.status is Status.SUSPECT:
                self.suspected.setdefault(key, time)
            if change.status is Status.DEAD:
                shortest = 0.98 * self.timers.suspicion_mult * self.timers.probe
                first = self.suspected.get(key)
                self.require(
                    first is not None and time >= first + shortest,
                    f"{change} at {observer}, {time - (first or time):.2f} s after first suspected",
                )
        self._seen = len(log)

    def take_note(self, statistics):
        self.reached |= {
            name
            for name in ("refuted", "refutations", "rescued", "stalls")
            if getattr(statistics, name)
        }

    def require(self, holds, what):
        if not holds:
            raise Broken(f"{what} (at {self.cluster.now:.3f} s)")
