"""Runtime two: every peer's state machine under a virtual clock and a modelled network."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from p2pfl.errors import RemoteProtocolError, RunError
from p2pfl.learning.training import train
from p2pfl.learning.tree import concat, take
from p2pfl.peer.events import (
    Effect,
    Evaluate,
    Evaluated,
    Event,
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
from p2pfl.runtime import wire
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.setup import Ending, Row, Setup
from p2pfl.runtime.sketch import distances, sketch


class Emulator:
    """A heap of events, each for one peer.

    Training is put off until the first result is due and then done for all peers at once:
    as the answer to `Train` depends on nothing but `Train`, nobody can tell. Evaluation
    takes no virtual time.
    """

    def __init__(
        self,
        setup: Setup,
        network: NetworkModel,
        crashes: Mapping[PeerId, float] | None = None,
    ) -> None:
        self.setup, self.network = setup, network
        self._crashes = dict(crashes or {})
        self.crashed: set[PeerId] = set()
        self.peers = {node: setup.peer(node) for node in range(setup.topology.n)}
        self.time, self.rejected, self.missed = 0.0, 0, 0
        self.updates, self.batches = 0, 0  # local steps, and how many calls they took
        self._nodes = torch.arange(setup.topology.n)
        self._examples = setup.task.examples(self._nodes).tolist()
        self._heap: list[tuple[float, int, PeerId, Event | Train | _Crash]] = []
        self._order = itertools.count()
        self._pending: dict[PeerId, Train] = {}
        self._ready: dict[PeerId, Trained] = {}
        self._line_free: dict[PeerId, float] = {}
        self._link_free: dict[tuple[PeerId, PeerId], float] = {}
        self._arrived: dict[tuple[PeerId, PeerId], float] = {}
        self._numbers: Counter[tuple[PeerId, PeerId]] = Counter()
        self._sent: Counter[tuple[PeerId, int]] = Counter()  # bytes by (node, round)
        self._stopped: dict[PeerId, str] = {}
        self._rounds = _Rounds(set(self.peers))
        self._clock = time.perf_counter()

    @property
    def ending(self) -> Ending:
        """How the run has come out so far; peers that crashed are left out."""
        nodes = torch.tensor([p for p in self.peers if p not in self.crashed], dtype=torch.int64)
        none = self.setup.task.init(nodes[:0])
        params = torch.cat([none, *(self.peers[p].params for p in nodes.tolist())])
        reason = ", ".join(sorted(set(self._stopped.values())))
        return Ending(params, nodes, reason, self.updates, self.time, self.missed, self.rejected)

    def rounds(self) -> Iterator[list[Row]]:
        """Run until nothing is left to happen; yield a round once every live peer ended it.

        Raises:
            RunError: the training of a peer has diverged, or peers wait for ever.
        """
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
            yield from self._rounds.complete()
        yield from self._rounds.rest()
        self._check_all_stopped()

    def _check_all_stopped(self) -> None:
        waiting = sorted(self.peers.keys() - self._stopped.keys() - self.crashed)
        if waiting:
            raise RunError(
                f"{len(waiting)} nodes, {waiting[0]} among them, wait for ever for messages that"
                " were lost: pace.patience must be finite where messages can be lost"
            )

    def _crash(self, peer: PeerId) -> None:
        self.crashed.add(peer)
        self._pending.pop(peer, None)
        self._rounds.leave(peer)
        self._notify_loss(peer, [p for p in self.peers if p != peer], 0.0)

    def _deliver(self, peer: PeerId, event: Event | Train) -> None:
        happened = self._trained(peer) if isinstance(event, Train) else event
        try:
            effects = self.peers[peer].handle(happened)
        except RemoteProtocolError:  # say, the last words of a peer which was given up
            self.rejected += 1
            return
        for effect in effects:
            self._carry_out(peer, effect)

    def _carry_out(self, peer: PeerId, effect: Effect) -> None:
        match effect:
            case Train(step=step, count=count):
                self._pending[peer] = effect
                self._at(self.time + self.network.training(peer, step, count), peer, effect)
            case Send():
                self._send(peer, effect)
            case SetTimer(after=after, round=number):
                self._at(self.time + after, peer, TimerFired(number))
            case Report():
                self.missed += len(effect.missed)
                self._rounds.add(self._row(peer, effect), sketch(effect.params))
            case Evaluate():
                self._evaluate(peer, effect)
            case Stop(reason=reason):
                self._stopped[peer] = reason
                self._rounds.leave(peer)
                sends_to, _ = self.setup.topology.view(peer, 0)
                self._notify_loss(peer, sends_to, self.network.latency)

    def _row(self, peer: PeerId, report: Report) -> Row:
        return Row(
            round=report.round,
            node=peer,
            train_loss=report.loss,
            eval_loss=math.nan,
            eval_acc=math.nan,
            num_examples=self._examples[peer],
            consensus_distance=math.nan,
            bytes_sent=self._sent.pop((peer, report.round), 0),
            bytes_received=report.received,
            wall_s=time.perf_counter() - self._clock,
            virtual_s=self.time,
        )

    def _send(self, src: PeerId, send: Send) -> None:
        size = wire.size(src, send)
        for dst in send.to:
            self._sent[src, send.round] += size
            link = (src, dst)
            start = max(self.time, self._line_free.get(src, 0.0))
            free = self._link_free.get(link, 0.0)
            delivery = self.network.delivery(link, self._numbers[link], size, start, free)
            self._numbers[link] += 1
            self._line_free[src], self._link_free[link] = delivery.leaves, delivery.passes
            if delivery.arrives == math.inf:
                continue
            due = max(delivery.arrives, self._arrived.get(link, 0.0))  # links are in order
            self._arrived[link] = due
            message = Received(src, send.round, send.degree, send.score, send.message, size)
            self._at(due, dst, message)

    def _notify_loss(self, src: PeerId, others: Iterable[PeerId], after: float) -> None:
        for dst in others:  # what was sent before arrives before
            due = max(self.time + after, self._arrived.get((src, dst), 0.0))
            self._at(due, dst, PeerDown(src))

    def _evaluate(self, peer: PeerId, evaluate: Evaluate) -> None:
        loss, acc = self.setup.task.evaluate(evaluate.params, torch.tensor([peer]))
        self._rounds.evaluated(peer, evaluate.round, loss.item(), acc.item())
        self.peers[peer].handle(Evaluated(evaluate.round, loss.item(), acc.item()))

    def _trained(self, peer: PeerId) -> Trained:
        if peer not in self._ready:
            trains = list(self._pending.values())
            nodes = torch.tensor(list(self._pending))
            first = torch.tensor([train.step for train in trains])
            count = torch.tensor([train.count for train in trains])
            state: Any = concat([train.state for train in trains])
            state, loss = train(self.setup.algorithm, self.setup.task, state, nodes, first, count)
            for i, (node, asked) in enumerate(self._pending.items()):
                row = take(state, torch.tensor([i]))
                self._ready[node] = Trained(asked.step, row, loss[i].item())
            self._pending.clear()
            self.batches += 1
            self.updates += int(count.sum())
        return self._ready.pop(peer)

    def _at(self, due: float, peer: PeerId, event: Event | Train | _Crash) -> None:
        heapq.heappush(self._heap, (due, next(self._order), peer, event))


class _Crash:
    """A peer falls silent for good."""


class _Rounds:
    """Rows wait here until every live peer has ended the round, to be compared."""

    def __init__(self, live: set[PeerId]) -> None:
        self._live = live
        self._rows: dict[int, dict[PeerId, tuple[Row, Tensor]]] = {}
        self._touched: set[int] = set()  # rounds which may have become complete

    def add(self, row: Row, mark: Tensor) -> None:
        rows = self._rows.setdefault(row.round, {})
        rows[row.node] = (row, mark)
        if len(rows) >= len(self._live):
            self._touched.add(row.round)

    def leave(self, peer: PeerId) -> None:
        """Wait for this peer no longer; what it has reported stays."""
        self._live.discard(peer)
        self._touched.update(self._rows)

    def evaluated(self, peer: PeerId, round: int, loss: float, acc: float) -> None:
        row, mark = self._rows[round][peer]
        self._rows[round][peer] = (row._replace(eval_loss=loss, eval_acc=acc), mark)

    def complete(self) -> Iterator[list[Row]]:
        """Yield the rounds which all peers have ended."""
        for round in sorted(self._touched):
            if self._live <= self._rows[round].keys():
                yield self._compared(round)
        self._touched.clear()

    def rest(self) -> Iterator[list[Row]]:
        """Yield the rounds which some peers never ended."""
        for round in sorted(self._rows):
            yield self._compared(round)

    def _compared(self, round: int) -> list[Row]:
        rows = self._rows.pop(round)
        far = distances(torch.cat([mark for _, mark in rows.values()])).tolist()
        together = zip(rows.values(), far, strict=True)
        table = [row._replace(consensus_distance=distance) for (row, _), distance in together]
        return sorted(table, key=lambda row: row.node)
