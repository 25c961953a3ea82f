"""Runtime two: every peer's state machine under a virtual clock and a modelled network."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch

from p2pfl.errors import RemoteProtocolError, RunError
from p2pfl.learning.scratch import keep_freed_memory
from p2pfl.peer.events import (
    Effect,
    Evaluate,
    Evaluated,
    Event,
    Machine,
    PeerDown,
    PeerId,
    Received,
    Report,
    Send,
    SetTimer,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.runtime.batch import Batch
from p2pfl.runtime.gathering import Gathering
from p2pfl.runtime.later import Later, postponed
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.post import Post
from p2pfl.runtime.setup import Ending, Row, Seconds, Setup
from p2pfl.runtime.sketch import sketch

TOGETHER = 16  # models which wait to be evaluated, at most


class Emulator:
    """A heap of events, each for one peer.

    Training is put off until the first result is due and then done for all peers at once:
    as the answer to `Train` depends on nothing but `Train`, nobody can tell. So is what is
    mixed before it, see `later`. Evaluation takes no virtual time.

    Args:
        setup: the run.
        network: how long everything takes.
        crashes: when peers fall silent for good, in virtual seconds.

    Attributes:
        seconds: where the real time has gone so far; mixing is part of training.
        time: the virtual time, in seconds.
        missed: messages waited for in vain.
        rejected: messages refused.
    """

    def __init__(
        self,
        setup: Setup,
        network: NetworkModel,
        crashes: Mapping[PeerId, float] | None = None,
    ) -> None:
        keep_freed_memory()
        self.setup, self.network = setup, network
        self._crashes = dict(crashes or {})
        self.crashed: set[PeerId] = set()
        lazy = dataclasses.replace(setup, algorithm=postponed(setup.algorithm))
        self.peers = {node: lazy.peer(node) for node in range(setup.topology.n)}
        self.time, self.rejected, self.missed = 0.0, 0, 0
        self.seconds = Seconds()
        self._examples = setup.task.examples(torch.arange(setup.topology.n)).tolist()
        self._heap: list[tuple[float, int, PeerId, Event | Train | _Crash]] = []
        self._order = itertools.count()
        self._unmeasured: list[tuple[PeerId, Evaluate]] = []
        self._post = Post(network)
        self._stopped: dict[PeerId, str] = {}
        self._rounds = Gathering(set(self.peers))
        self._clock = time.perf_counter()
        stop = getattr(setup.pace, "stop", None)
        # In step, models trained together are given up together; where some peers are slow,
        # theirs would keep those of many.
        in_step = getattr(setup.pace, "patience", 0.0) == math.inf
        self._batch = Batch(setup, keep_blocks=in_step)
        self._together = 1 if stop and stop.metric != "train_loss" else TOGETHER

    @property
    def updates(self) -> int:
        """The local steps in all models, those of peers that crashed included."""
        return sum(peer.step for peer in self.peers.values())

    @property
    def batches(self) -> int:
        """How many times training was done for all who waited for it."""
        return self._batch.count

    @property
    def ending(self) -> Ending:
        """How the run has come out so far; peers that crashed are left out."""
        nodes = torch.tensor([p for p in self.peers if p not in self.crashed], dtype=torch.int64)
        none = self.setup.task.init(nodes[:0])
        models = (self.setup.algorithm.model(self.state(p)) for p in nodes.tolist())
        params = torch.cat([none, *models])
        reason = ", ".join(sorted(set(self._stopped.values())))
        return Ending(params, nodes, reason, self.updates, self.time, self.missed, self.rejected)

    def state(self, peer: PeerId) -> Any:  # noqa: ANN401 - whatever the algorithm keeps
        """Return the state of a peer's algorithm."""
        return _later(self.peers[peer]).now()

    def rounds(self) -> Iterator[list[Row]]:
        """Run until nothing is left to happen; yield a round once every live peer ended it.

        Raises:
            RunError: the training of a peer has diverged, or peers wait for ever.
        """
        history = self._history()
        while True:
            began, spent = time.perf_counter(), self.seconds.training + self.seconds.evaluation
            rows = next(history, None)
            spent = self.seconds.training + self.seconds.evaluation - spent
            self.seconds.exchange += time.perf_counter() - began - spent
            if rows is None:
                return
            yield rows

    def _history(self) -> Iterator[list[Row]]:
        for peer, due in self._crashes.items():
            self._at(due, peer, _Crash())
        for peer in self.peers:
            self._at(0.0, peer, Started())
        while self._heap:
            due, _, peer, event = heapq.heappop(self._heap)
            if peer in self._stopped or peer in self.crashed:
                continue
            self.time = due
            if isinstance(event, _Crash):
                self._crash(peer)
            else:
                self._deliver(peer, event)
            for round in self._rounds.complete():
                yield self._compared(round)
        for round in self._rounds.rest():
            yield self._compared(round)
        self._check_all_stopped()

    def _compared(self, round: int) -> list[Row]:
        self._measure()
        return self._rounds.compared(round)

    def _check_all_stopped(self) -> None:
        waiting = sorted(self.peers.keys() - self._stopped.keys() - self.crashed)
        if waiting:
            raise RunError(
                f"{len(waiting)} nodes, {waiting[0]} among them, wait for ever for messages that"
                " were lost: pace.patience must be finite where messages can be lost"
            )

    def _crash(self, peer: PeerId) -> None:
        self.crashed.add(peer)
        self._batch.forget(peer)
        self._rounds.leave(peer)
        self._notify_loss(peer, [p for p in self.peers if p != peer], 0.0)

    def _deliver(self, peer: PeerId, event: Event | Train) -> None:
        happened = self._trained(peer) if isinstance(event, Train) else event
        try:
            effects = self.peers[peer].handle(happened)
        except RemoteProtocolError:  # say, the last words of a peer which was given up
            self.rejected += 1
            return
        last = bool(effects) and isinstance(effects[-1], Stop)
        for effect in effects:
            self._carry_out(peer, effect, last)

    def _carry_out(self, peer: PeerId, effect: Effect, last: bool) -> None:
        match effect:
            case Train(step=step, count=count):
                self._batch.ask(peer, effect)
                self._at(self.time + self.network.training(peer, step, count), peer, effect)
            case Send():
                self._send(peer, effect)
            case SetTimer(after=after, round=number):
                self._at(self.time + after, peer, TimerFired(number))
            case Report():
                self._report(peer, effect, last)
            case Evaluate():
                self._unmeasured.append((peer, effect))
                if len(self._unmeasured) >= self._together:
                    self._measure()
            case Stop(reason=reason):
                self._stopped[peer] = reason
                self._batch.forget(peer)  # what was for a round that there will not be
                self._rounds.leave(peer)
                self._notify_loss(
                    peer, sorted(self.setup.topology.contacts(peer)[0]), self.network.latency
                )

    def _report(self, peer: PeerId, report: Report, last: bool) -> None:
        self.missed += len(report.missed)
        row = Row(
            round=report.round,
            node=peer,
            train_loss=report.loss,
            eval_loss=math.nan,
            eval_acc=math.nan,
            num_examples=self._examples[peer],
            consensus_distance=math.nan,
            bytes_sent=self._post.sent(peer, report.round),
            bytes_received=report.received,
            wall_s=time.perf_counter() - self._clock,
            virtual_s=self.time,
        )
        every, mark = self.setup.pace.evaluate_every, None
        if every and (last or (report.round + 1) % every == 0):
            params = _later(report).params
            began = time.perf_counter()
            mark = sketch(params)
            self.seconds.evaluation += time.perf_counter() - began
        self._rounds.add(row, mark)

    def _send(self, src: PeerId, send: Send) -> None:
        size = self._post.size(src, send)
        message = Received(src, send.round, send.degree, send.score, send.message, size)
        for dst in send.to:
            due = self._post.due(src, dst, size, self.time)
            if due < math.inf:
                self._at(due, dst, message)

    def _notify_loss(self, src: PeerId, others: Iterable[PeerId], after: float) -> None:
        for dst in others:  # what was sent before arrives before
            self._at(self._post.not_before(src, dst, self.time + after), dst, PeerDown(src))

    def _measure(self) -> None:
        """Evaluate the models that wait for it."""
        waiting, self._unmeasured = self._unmeasured, []
        if not waiting:
            return
        models = [_later(asked).params for _, asked in waiting]
        began = time.perf_counter()
        nodes = torch.tensor([peer for peer, _ in waiting])
        scores = self.setup.task.evaluate(torch.cat(models), nodes)
        each = list(zip(waiting, *(field.tolist() for field in scores), strict=True))
        self.seconds.evaluation += time.perf_counter() - began
        for (peer, asked), loss, acc in each:
            self._rounds.evaluated(peer, asked.round, loss, acc)
            self._deliver(peer, Evaluated(asked.round, loss, acc))

    def _trained(self, peer: PeerId) -> Trained:
        trained = self._batch.fetch(peer)
        self.seconds.training = self._batch.seconds
        return trained

    def _at(self, due: float, peer: PeerId, event: Event | Train | _Crash) -> None:
        heapq.heappush(self._heap, (due, next(self._order), peer, event))


class _Crash:
    """A peer falls silent for good."""


def _later(has: Machine | Report | Evaluate) -> Later:
    """Return what a peer takes for its model, which is a state in truth: see `postponed`."""
    return cast(Later, has.params)
