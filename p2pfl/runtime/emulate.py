"""Runtime two: every peer's state machine under a virtual clock and a modelled network.

What happens to peers and links besides is a churn script, carried out by `churning`; who
finds out about it, and when, is up to the membership machines of the peers, in `rosters`.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from p2pfl.errors import RemoteProtocolError, RunError
from p2pfl.learning.scratch import keep_freed_memory, seldom_collected
from p2pfl.peer.events import (
    Discard,
    Effect,
    Evaluate,
    Event,
    Machine,
    PeerId,
    Position,
    Received,
    Report,
    Send,
    SetTimer,
    Skip,
    Skipped,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.peer.plan import is_measured
from p2pfl.peer.rounds import TIME_IS_UP
from p2pfl.runtime.batch import Batch
from p2pfl.runtime.churning import Churning
from p2pfl.runtime.conserved import watched
from p2pfl.runtime.gathering import Gathering
from p2pfl.runtime.later import later, postponed
from p2pfl.runtime.measuring import Measuring
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.post import Post
from p2pfl.runtime.rosters import Tick, Told
from p2pfl.runtime.setup import Ending, Row, Seconds, Setup

SMALL = 64  # bytes of a message that is no model, about

_MEMBERSHIP = (Told, Tick)  # what is for the membership machines

Happens: TypeAlias = Event | Train | Told | Tick | Callable[[], None]


class Emulator:
    """A heap of events, each for one peer.

    Training is put off until the first result is due and then done for all peers at once:
    as the answer to `Train` depends on nothing but `Train`, nobody can tell. So is what is
    mixed before it, see `later`. Evaluation takes no virtual time.

    Args:
        setup: the run.
        network: how long everything takes.

    Attributes:
        peers: the machines of those that run, or have run to their end.
        gone: the last ones of those that were killed or have left.
        stopped: who is done, and why.
        positions: where each peer stood when it ended its last round.
        seconds: where the real time has gone so far; mixing is part of training.
        time: the virtual time, in seconds.
        missed: messages waited for in vain.
        rejected: messages refused.
        drift: how far exchanges have moved the mean; None: that is not watched.
    """

    def __init__(self, setup: Setup, network: NetworkModel) -> None:
        keep_freed_memory()
        self.setup, self.network = setup, network
        self.drift = watched(setup)
        algorithm = self.drift.watch(setup.algorithm) if self.drift else setup.algorithm
        self._lazy = dataclasses.replace(setup, algorithm=postponed(algorithm))
        self.peers: dict[PeerId, Machine] = {}
        self.positions: dict[PeerId, Position] = {}
        self.time, self.rejected, self.missed, self.one_sided = 0.0, 0, 0, 0
        self.seconds = Seconds()
        self._examples = setup.task.examples(torch.arange(setup.topology.n)).tolist()
        self._heap: list[tuple[float, PeerId, int, int, Happens]] = []
        self._order = itertools.count()
        self._lives: Counter[PeerId] = Counter()  # what was meant for an earlier one is void
        self._held: dict[PeerId, tuple[float, list[tuple[float, Happens]]]] = {}
        self.stopped: dict[PeerId, str] = {}
        self.gone: dict[PeerId, Machine] = {}
        self._clock = time.perf_counter()
        # In step, models trained together are given up together; where some peers are slow,
        # theirs would keep those of many.
        in_step = getattr(setup.pace, "patience", 0.0) == math.inf
        self._batch = Batch(setup, keep_blocks=in_step)
        self._rounds = Gathering(set())
        self._measuring = Measuring(setup, self._rounds)
        self.churning = Churning(self)
        self.post = Post(network, self.churning.turmoil)
        for node in range(setup.topology.n):
            if node not in self.churning.turmoil.down:
                self.enter(node)

    @property
    def updates(self) -> int:
        """The local steps that were taken, those of peers that are gone included."""
        return sum(peer.step for peer in {**self.gone, **self.peers}.values())

    @property
    def batches(self) -> int:
        """How many times training was done for all who waited for it."""
        return self._batch.count

    @property
    def ending(self) -> Ending:
        """How the run has come out so far, for those who are there."""
        nodes = torch.tensor(sorted(self.peers), dtype=torch.int64)
        none = self.setup.task.init(nodes[:0])
        models = (self.setup.algorithm.model(self.state(p)) for p in nodes.tolist())
        params = torch.cat([none, *models])
        reason = ", ".join(sorted(set(self.stopped.values())))
        return Ending(
            params,
            nodes,
            reason,
            self.updates,
            self.time,
            self.missed,
            self.rejected,
            self.one_sided,
            self.setup.mass(nodes, map(self.state, nodes.tolist())),
        )

    def state(self, peer: PeerId) -> Any:  # noqa: ANN401 - whatever the algorithm keeps
        """Return the state of a peer's algorithm, the last one if it is gone."""
        return later((self.peers.get(peer) or self.gone[peer]).params).now()

    def at(self, due: float, peer: PeerId, happens: Happens) -> None:
        """Let something happen to a peer, unless its life ends before."""
        life = self._lives[peer]
        # At one time one peer after the other, so that what belongs to one is in the cache once.
        heapq.heappush(self._heap, (due, peer, next(self._order), life, happens))

    def enter(self, peer: PeerId, begin: Position | None = None) -> None:
        """Make the machine of a peer, which begins now, or goes on from somewhere."""
        self._lives[peer] += 1
        machine = self._lazy.peer(peer, begin)
        self.peers[peer] = machine
        self._rounds.join(peer, machine.round)
        self.at(self.time, peer, Started())

    def vanish(self, peer: PeerId) -> None:
        """End the life of a peer, and everything that was meant for it."""
        self._lives[peer] += 1
        self._batch.forget(peer)
        self._rounds.leave(peer)
        self._held.pop(peer, None)
        self.stopped.pop(peer, None)
        if machine := self.peers.pop(peer, None):
            if self.drift:
                later(machine.params).now()  # its last exchange counts
            self.gone[peer] = machine
            self._measuring.forget(peer)

    def freeze(self, peer: PeerId) -> None:
        """Let nothing happen to a peer until it is thawed."""
        self._held.setdefault(peer, (self.time, []))

    def is_frozen(self, peer: PeerId) -> bool:
        """Say whether a peer is stopped just now."""
        return peer in self._held

    def thaw(self, peer: PeerId) -> None:
        """Let everything happen that was held up: input before timers, and work goes on."""
        since, held = self._held.pop(peer)
        arrived = [one for one in held if isinstance(one[1], Received | Skipped | Told)]
        for due, happens in arrived + [one for one in held if one not in arrived]:
            works = isinstance(happens, Train)
            self.at(due + self.time - since if works else self.time, peer, happens)

    def rounds(self) -> Iterator[list[Row]]:
        """Run until nothing is left to happen; yield a round once every live peer ended it.

        Raises:
            RunError: the training of a peer has diverged, or peers wait for ever.
        """
        history = self._history()
        while True:
            began, spent = time.perf_counter(), self.seconds.training + self.seconds.evaluation
            with seldom_collected():
                rows = next(history, None)
            spent = self.seconds.training + self.seconds.evaluation - spent
            self.seconds.exchange += time.perf_counter() - began - spent
            if rows is None:
                return
            yield rows

    def _history(self) -> Iterator[list[Row]]:
        self.churning.begin()
        while self._heap and not self.churning.is_over:
            due, peer, _, life, happens = heapq.heappop(self._heap)
            if life != self._lives[peer]:
                continue
            if peer in self._held and not callable(happens):
                self._held[peer][1].append((due, happens))
                continue
            self.time = due
            self._happen(peer, happens)
            for round in self._rounds.complete():
                yield self._compared(round)
        for round in self._rounds.rest():
            yield self._compared(round)
        self._check_all_stopped()

    def _happen(self, peer: PeerId, happens: Happens) -> None:
        if isinstance(happens, _MEMBERSHIP):
            self.churning.hear(peer, happens)
            return
        self.churning.note_life()
        if callable(happens):
            happens()
        else:
            self.tell(peer, happens)

    def _compared(self, round: int) -> list[Row]:
        self._measure()
        return self._rounds.compared(round)

    def _check_all_stopped(self) -> None:
        waiting = sorted(self.peers.keys() - self.stopped.keys())
        if not waiting:
            return
        who = f"{len(waiting)} nodes, {waiting[0]} among them,"
        if all(map(self.is_frozen, waiting)):
            raise RunError(f"{who} were stopped by the churn script, which lets none of them go on")
        raise RunError(
            f"{who} wait for ever for messages that were lost: pace.patience must be finite where"
            " messages can be lost"
        )

    def tell(self, peer: PeerId, event: Event | Train) -> None:
        """Tell a peer what has happened, and do what it asks for."""
        if peer in self.stopped or peer not in self.peers:
            return
        happened = self._trained(peer) if isinstance(event, Train) else event
        try:
            effects = self.peers[peer].handle(happened)
        except RemoteProtocolError:  # say, the last words of a peer which was given up
            self.rejected += 1
            return
        last = bool(effects) and isinstance(effects[-1], Stop)
        for effect in effects:
            self._carry_out(peer, effect, last)

    def _carry_out(self, peer: PeerId, effect: Effect, last: bool) -> None:  # noqa: C901
        match effect:
            case Train(step=step, count=count):
                self._batch.ask(peer, effect)
                spent = self.network.training(peer, step, count)
                self.at(self.time + spent * self.churning.turmoil.slowness(peer), peer, effect)
            case Send():
                self._send(peer, effect)
            case Skip(to=to, round=round, kept=kept):
                for dst in to:
                    self._dispatch(peer, dst, SMALL, Skipped(peer, round, kept))
            case SetTimer(after=after, round=number):
                since = 0.0 if number == TIME_IS_UP else self.time  # all began together
                self.at(max(self.time, since + after), peer, TimerFired(number))
            case Report():
                self._report(peer, effect, last)
            case Evaluate():
                if self._measuring.ask(peer, effect):
                    self._measure()
            case Discard():
                pass  # nothing else holds it
            case Stop(reason=reason):
                self._stop(peer, reason)

    def _stop(self, peer: PeerId, reason: str) -> None:
        self.stopped[peer] = reason
        self._batch.forget(peer)  # what was for a round that there will not be
        self._rounds.leave(peer)
        self.churning.done(peer)

    def _report(self, peer: PeerId, report: Report, last: bool) -> None:
        self.missed += len(report.missed)
        self.one_sided += report.one_sided
        row = Row(
            round=report.round,
            node=peer,
            train_loss=report.loss,
            eval_loss=math.nan,
            eval_acc=math.nan,
            num_examples=self._examples[peer],
            consensus_distance=math.nan,
            bytes_sent=self.post.sent(peer, report.round),
            bytes_received=report.received,
            wall_s=time.perf_counter() - self._clock,
            virtual_s=self.time,
        )
        self._rounds.add(row)
        due = is_measured(self.setup.pace.evaluate_every, report.round, last)
        if due and self._measuring.report(peer, report):
            self._measure()
        if self.setup.churn:
            self.positions[peer] = self.peers[peer].position
        self.churning.ended_round(peer, report.round)

    def _send(self, src: PeerId, send: Send) -> None:
        size = self.post.size(src, send)
        message = Received(src, send.round, send.degree, send.score, send.message, size, send.fresh)
        for dst in send.to:
            self._dispatch(src, dst, size, message)

    def _dispatch(self, src: PeerId, dst: PeerId, size: int, message: Received | Skipped) -> None:
        rosters = self.churning.rosters if self.setup.churn else None
        if rosters and dst in self.peers and not rosters.introduce(src, dst, self.time):
            return  # it was for an earlier life
        due = self.post.due(src, dst, size, self.time)
        if due < math.inf and not self.post.is_damaged(src, dst):
            if rosters:
                rosters.introduce(dst, src, due)
            self.at(due, dst, message)
        elif due < math.inf:
            self.rejected += 1

    def _measure(self) -> None:
        """Measure the models that wait for it."""
        told = self._measuring.measure()
        self.seconds.evaluation = self._measuring.seconds
        for peer, evaluated in told:
            self.tell(peer, evaluated)

    def _trained(self, peer: PeerId) -> Trained:
        if not self._batch.is_done(peer):
            self._measuring.settle()  # or what is measured would be worked out twice
        trained = self._batch.fetch(peer)
        self.seconds.training = self._batch.seconds
        return trained
