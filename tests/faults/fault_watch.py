"""An emulator that is looked at after everything that happens."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict

import torch
from fault_plan import FAULTS_END, FOREVER, setup

from p2pfl.membership.members import Status
from p2pfl.peer.events import Received, Skipped, TimerFired
from p2pfl.peer.rounds import TIME_IS_UP, Peer
from p2pfl.runtime.churning import NOBODY
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.rosters import Machines, Told
from p2pfl.topology import weights

AVERAGING = ("dpsgd", "fedavg", "combine first")
AGREED_BY = FAULTS_END + 75.0  # seconds: all know who is there
LONG = 6.0
WATCHED = 35.0  # seconds after that, in which all must get on


class Broken(AssertionError):
    pass


def require(holds, what):
    if not holds:
        raise Broken(what)


def broken_rule(known, one, issued):
    """Return which invariant it breaks to believe `one` of a member after `known`, or nothing."""
    if one.incarnation > issued:
        return "I2"
    if known is None or one.incarnation > known.incarnation:
        return ""
    if one.incarnation < known.incarnation:
        return "I1"
    return "I4" if one.status < known.status else ""


class Watched(Emulator):
    """The run of a plan.

    Attributes:
        reached: what has happened at least once, of that which should happen sometimes.
        uses: whose model of which life and round a peer of some life took in which round, and
            its weight.
        events: how many there were.
    """

    def __init__(self, plan):
        self.plan, self.hash, self.events = plan, hashlib.sha256(), 0
        self.reached, self.uses = Counter(), {}
        self.letters = {}  # sender, life and round of each message; it is kept alive, too
        self.taken = set()
        self.excused, self.expected, self.counted = set(), Counter(), Counter()
        self.closed, self.skipped, self.spoke = set(), set(), {}
        self.issued, self.believed = {}, defaultdict(dict)
        self.then = None
        super().__init__(setup(plan), plan.network)
        self.at(FAULTS_END + 1.5, NOBODY, self.look_for_agreement)

    # What is looked at.

    def _happen(self, peer, happens):
        self.events += 1
        what = type(happens).__name__
        about = [getattr(happens, name, None) for name in ("sender", "round", "peer", "step")]
        if what not in ("Told", "Tick", "Train"):
            what = what if not callable(happens) else "call"
        body = happens.body if isinstance(happens, Told) else b""
        self.hash.update(repr((self.time, peer, what, about)).encode() + body)
        super()._happen(peer, happens)
        if isinstance(self.churning.rosters, Machines):
            self.look_at_members(peer)

    def enter(self, peer, begin=None):
        if peer in self.gone:
            self.reached["rejoin"] += 1
        super().enter(peer, begin)
        if isinstance(self.peers[peer], Peer):
            self.tap(peer, self.peers[peer])

    def tap(self, me, machine):
        """Listen to what a peer takes out of its mail."""
        mail, life = machine.mail, self._lives[me]
        open_, remember, inbox, take = mail.open, mail.remember, mail._inbox, mail._ledger.take
        state = {}

        def opening(view, round, everything):
            state.update(letters=[], weights={})
            opened = open_(view, round, everything)
            use = {}
            for sender, message in state["letters"]:
                key = self.letters[id(message)][0]
                self.take(me, life, round, key, message)
                use[key] = state["weights"].get(sender, 0.0)
            self.uses[me, life, round] = use
            if machine._mutual:
                self.expected[me, life] += sum(round != key[2] for key in use)
            return opened

        def remembering(peer, degree, message, *more):
            if peer != me and id(message) in self.letters:
                state["letters"].append((peer, message))
            return remember(peer, degree, message, *more)

        def taking(sender, said):  # of sums of shares, what is new in them is remembered
            state["letters"].append((sender, said))
            return take(sender, said)

        def boxing(entries):
            made = inbox(entries)
            self.look_at_row(me, made.weights, mail._mixing.conserves)
            ids = sorted([peer for peer, *_ in entries] + [me])
            state["weights"] = dict(zip(ids, made.weights[0].tolist(), strict=True))
            return made

        mail.open, mail.remember, mail._inbox = opening, remembering, boxing
        mail._ledger.take = taking

    def take(self, me, life, round, key, message):
        what = f"{me} (life {life}) takes the model of {key} in round {round}"
        require((me, life, *key) not in self.taken, f"I7 {what} twice")
        self.taken.add((me, life, *key))
        require(all(bool(block.isfinite().all()) for block in message), f"I8 {what}: not finite")

    def look_at_row(self, me, row, conserves):
        weights = row.flatten().tolist()  # which is quicker to print than a tensor
        require(min(weights) >= -1e-12, f"I5 {me} mixes with negative weights: {weights}")
        if conserves == "mean":
            total = math.fsum(weights)
            require(abs(total - 1) < 1e-9, f"I5 a row of {me} sums to {total}")

    def look_at_members(self, peer):
        swim = self.churning.rosters._swims.get(peer)
        if swim is None:
            return
        own, before = swim.members[peer], self.believed[peer, self._lives[peer]]
        self.issued[peer] = max(self.issued.get(peer, 0), own.incarnation)
        require(own.status is Status.ALIVE, f"I3 {peer} believes itself {own.status!r}")
        for k, one in swim.members.items():
            known = before.get(k)
            if known is one:
                continue
            before[k] = one
            rule = broken_rule(known, one, self.issued.get(k, 0))
            require(not rule, rule and f"{rule} {peer} believes {one} after {known}")
            if known and (known.status, one.status) == (Status.DEAD, Status.ALIVE):
                self.reached["heal"] += 1
        if swim.statistics.refutations:
            self.reached["refute"] = 1

    def look_at_mail(self, peer):
        machine = self.peers[peer]
        if not isinstance(machine, Peer) or not machine.mail._drops:
            return
        held = [len(letters) for letters in machine.mail.unopened.values()]
        require(max(held, default=0) <= machine.mail._backlog, f"I6 mail of {peer}: {held}")
        require(len(held) <= self.plan.n, f"I6 {peer} keeps mail of {len(held)} senders")

    def _report(self, peer, report, last):
        life, machine = self._lives[peer], self.peers[peer]
        super()._report(peer, report, last)
        self.counted[peer, life] += report.one_sided
        self.closed.add((peer, life, report.round))
        if isinstance(machine, Peer):
            self.reached["late"] += bool(report.missed)
            self.reached["one-sided"] += report.one_sided
            self.look_at_mail(peer)

    def _send(self, src, send):
        self.letters[id(send.message)] = (src, self._lives[src], send.round), send.message
        if isinstance(self.peers[src], Peer):
            last = self.spoke.get(key := (src, self._lives[src]), -1)
            again = send.round == last and self.setup.mixing.conserves == "mean"
            require(send.round >= last and not again, f"{src} speaks in round {send.round} again")
            self.reached["jump"] += key in self.spoke and send.round > last + 1
            self.spoke[key] = send.round
        super()._send(src, send)

    def _dispatch(self, src, dst, size, message):
        if not isinstance(message, Skipped):
            refused = self.rejected
            super()._dispatch(src, dst, size, message)
            self.reached["corrupt"] += self.rejected > refused
            return
        self.reached["skip"] += 1
        key = (dst, src, self._lives[src], message.round)
        self.skipped.add((*key, self._lives[dst]))
        before = len(self._heap)
        super()._dispatch(src, dst, size, message)
        if len(self._heap) == before:
            self.excused.add(key)

    def tell(self, peer, event):
        if isinstance(event, Skipped) and peer in self.peers and peer not in self.stopped:
            self.hear_skip(peer, event)
        if isinstance(event, Received) and peer in self.peers and peer not in self.stopped:
            self.reached["turned away"] += self._is_stranger(peer, event)
        super().tell(peer, event)

    def _is_stranger(self, peer, event):
        machine = self.peers[peer]
        return isinstance(machine, Peer) and machine._mutual and not machine._is_neighbour(event)

    def hear_skip(self, peer, event):
        """Expect that a model which was mixed, and whose sender did not mix ours, is counted."""
        life, machine = self._lives[peer], self.peers[peer]
        if not isinstance(machine, Peer):
            return
        use = self.uses.get((peer, life, event.round), {})
        key = event.sender, self._lives[event.sender], event.round
        if key in use and (peer, life, *key) not in self.excused:
            self.excused.add((peer, life, *key))
            self.expected[peer, life] += 1

    # What must come about in the end.

    def running(self):
        return [p for p in sorted(self.peers) if p not in self.stopped]

    def look_for_agreement(self):
        """Once a second, until all know who is there; then see how they get on."""
        running = self.running()
        everybody = set(range(self.plan.n))
        if self.stopped:
            return
        if self.churning._arriving:
            wrong = {}
        else:
            gone = {p: self.peers[p]._company.gone for p in running}
            wrong = {p: set(g ^ (everybody - set(running))) for p, g in gone.items()}
            if not self.plan.timers:  # the oracle tells those whom it concerns
                wrong = {p: g & set(self.contacts(p)) for p, g in wrong.items()}
            wrong = {p: sorted(g) for p, g in wrong.items() if g}
            if not wrong:
                self.begin_watching(running)
                return
        require(self.time < AGREED_BY, f"no agreement at {self.time:.0f} s: {wrong}")
        self.at(self.time + 1.0, NOBODY, self.look_for_agreement)

    def contacts(self, peer):
        return set(self.setup.topology.contacts(peer)[1])

    def begin_watching(self, running):
        self.then = {p: self.peers[p].round for p in running}, self.models(running)
        self.at(self.time + WATCHED, NOBODY, self.end_watching)

    def models(self, running):
        return {p: self.setup.algorithm.model(self.state(p)) for p in running}

    def end_watching(self):
        rounds, before = self.then
        if not self.stopped:
            gained = {p: self.peers[p].round - rounds[p] for p in self.running()}
            self.look_at_progress(gained)
            if self.is_in_step():
                self.look_at_rounds()
                self.look_at_consensus(before, min(gained.values()))
        if getattr(self.plan.pace, "rounds", 0) == FOREVER:
            for peer in self.running():
                self.tell(peer, TimerFired(TIME_IS_UP))

    def look_at_progress(self, gained):
        if not hasattr(self.plan.pace, "rounds"):
            return
        network, pace = self.plan.network, self.plan.pace
        slowest = network.compute * (network.slow_factor if network.slow else 1.0)
        round_ = (slowest + network.latency) * (1 + max(network.compute_jitter, network.jitter))
        waits = pace.patience if network.loss and pace.patience < math.inf else 0.0
        least = 0.4 * WATCHED / (round_ + waits) - 3
        slow = {p: g for p, g in gained.items() if g < least}
        require(not slow, f"at least {least:.1f} rounds in {WATCHED} s, but {slow}")

    def is_in_step(self):
        """Say whether all that is left is to wait for each other, which they have the time to."""
        network, patience = self.plan.network, getattr(self.plan.pace, "patience", 0.0)
        steady = not network.slow and not network.loss and self.setup.among is not None
        longest = network.compute * (1 + network.compute_jitter)
        longest += network.latency * (1 + network.jitter)
        return steady and patience >= 2 * longest and self._symmetric()

    def look_at_rounds(self):
        rounds = {p: self.peers[p].round for p in self.running()}
        far = max(rounds.values()) - min(rounds.values())
        require(far <= 2 + len(rounds) // 2, f"not in step again: {rounds}")

    def look_at_consensus(self, before, gained):
        long = self.plan.pace.patience > LONG  # who waits so long takes long to be in step again
        if self.plan.rate or long or self.plan.algorithm not in AVERAGING:
            return
        running = self.running()
        live = self.setup.among(tuple(running))
        x = torch.zeros(self.plan.n, before[running[0]].shape[1], dtype=torch.float64)
        x[running] = torch.cat([before[p] for p in running])
        first = self.then[0]
        # It takes a while until all are in step again, the longer where neighbours change.
        for k in range(gained // (3 if live.period else 6)):
            x = weights(live.links(min(first.values()) + k), self.setup.mixing).to_dense() @ x
        best = spread(x[running])
        now = spread(torch.cat([*self.models(running).values()]))
        require(now <= 1.1 * best + 1e-7, f"consensus error {now:.3g}, should be {best:.3g}")

    def perform(self):
        """Run it all; raises `Broken`."""
        for _ in self.rounds():
            pass
        require(not self.running(), f"{self.running()} never stop")
        self.look_at_pairs()
        return self

    def look_at_pairs(self):
        """See that each exchange was used by both of its ends alike, or counted."""
        if not self._symmetric():
            return
        for (me, life, round), use in self.uses.items():
            for key, weight in use.items():
                self.look_at_use(me, life, round, key, weight)
        for (peer, life), due in self.expected.items():
            machine = self.peers.get(peer)
            if machine is None or self._lives[peer] != life:
                continue
            counted = self.counted[peer, life] + machine._one_sided
            require(counted >= due, f"I10 {peer} counts {counted} one-sided exchanges of {due}")

    def _symmetric(self):
        machines = [m for m in self.peers.values() if isinstance(m, Peer)]
        return bool(machines) and machines[0]._mutual and self.plan.pace.patience > 0

    def look_at_use(self, me, life, round, key, weight):
        sender, theirs, said = key
        if said != round or (sender, theirs, round) not in self.closed:
            return  # an old one is counted at once; who never ended the round is gone
        back = self.uses[sender, theirs, round].get((me, life, round))
        what = f"{me} takes of {sender} in round {round} {weight:.4f}, which takes {back}"
        if back is not None:
            require(abs(back - weight) < 1e-12, f"I5 {what}")
            return
        told = {life_ for *k, life_ in self.skipped if k == [me, sender, theirs, round]}
        require(bool(told), f"I10 {what} and does not say so")


def spread(rows):
    return float((rows - rows.mean(0)).square().sum().sqrt())
