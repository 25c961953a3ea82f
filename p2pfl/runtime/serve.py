"""Runtime three: one peer, its sockets and the real clock."""

from __future__ import annotations

import contextlib
import heapq
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import zmq
from torch import Tensor

from p2pfl.algorithm import newest
from p2pfl.errors import RemoteProtocolError, RunError
from p2pfl.learning.evaluation import Scores
from p2pfl.learning.task import Task
from p2pfl.learning.training import train
from p2pfl.learning.tree import wide
from p2pfl.peer.events import (
    Effect,
    Evaluate,
    Evaluated,
    Event,
    PeerDown,
    Report,
    Send,
    SetTimer,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.peer.rounds import Pace
from p2pfl.runtime import wire
from p2pfl.runtime.handshake import NeighbourGone
from p2pfl.runtime.links import Links
from p2pfl.runtime.setup import Ending, Row, Setup
from p2pfl.runtime.sketch import sketch

# How long the loop may sleep: a signal (Ctrl-C) is noticed after so many milliseconds.
NAP = 250

TRAINING = 2  # the phase after those of the statistics; see `wire`

OnRow = Callable[[Row, Tensor], None]


class _Halted(Exception):
    """The worker was told to leave off."""


class _Haltable(Task):
    """A task whose training can be broken off between two steps."""

    def __init__(self, task: Task) -> None:
        self._task, self._halted = task, threading.Event()

    def halt(self) -> None:
        """Let the next step fail."""
        self._halted.set()

    @property
    def d(self) -> int:
        return self._task.d

    def init(self, nodes: Tensor) -> Tensor:
        return self._task.init(nodes)

    def examples(self, nodes: Tensor) -> Tensor:
        return self._task.examples(nodes)

    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        if self._halted.is_set():
            raise _Halted
        return self._task.grad(params, nodes, steps)

    def descend(self, params: Tensor, nodes: Tensor, first: Tensor, factors: Tensor) -> Tensor:
        total = torch.zeros(len(params), dtype=wide(params), device=params.device)
        for step in range(len(factors)):
            if self._halted.is_set():
                raise _Halted
            total += self._task.descend(params, nodes, first + step, factors[step : step + 1])
        return total

    def evaluate(self, params: Tensor, nodes: Tensor) -> Scores:
        if self._halted.is_set():
            raise _Halted
        return self._task.evaluate(params, nodes)


class Server:
    """Carry out the effects of one peer and tell it what happens.

    The loop waits for the network, the clock and the worker thread, and never for training:
    local steps and evaluations run one after the other in the worker.

    Args:
        setup: what is run.
        node: as which node.
        links: to its neighbours, whom it has met.
        phase: what messages are marked with.
        strict: every message is needed: a neighbour lost, or a message missed, is an error.
    """

    def __init__(
        self, setup: Setup, node: int, links: Links, phase: int = TRAINING, strict: bool = False
    ) -> None:
        self.setup, self.node, self.links, self.strict = setup, node, links, strict
        self.machine = setup.peer(node)
        links.expect(phase, wire.schema(setup.message(node)), self._replaceable)
        self._nodes = torch.tensor([node])
        self._task = _Haltable(setup.task)
        self._examples = int(setup.task.examples(self._nodes)[0])
        self._name = f"worker-{phase}"
        self._wake = links.inproc(self._name)
        self._worker = ThreadPoolExecutor(1, initializer=self._open_waker)
        self._results: list[Future[Event]] = []
        self._timers: list[tuple[float, int]] = []
        self._rows: dict[int, tuple[Row, Tensor]] = {}  # waiting for their evaluation
        self._evaluating: set[int] = set()
        self._sent: Counter[int] = Counter()
        self._missed, self._updates = 0, 0
        self._stopped = ""

    @property
    def _replaceable(self) -> bool:
        """Whether a newer message makes an unsent older one worthless.

        In step every round's message is waited for, however far its receiver is behind.
        """
        pace = self.setup.pace
        in_step = isinstance(pace, Pace) and pace.patience == math.inf
        mean = self.setup.mixing.conserves == "mean"
        return mean and self.setup.algorithm.absorb is newest and not in_step and not self.strict

    def run(self, on_row: OnRow, go_on: Callable[[], bool] = lambda: True) -> Ending:
        """Serve until the peer is done, or `go_on` says no.

        Args:
            on_row: told of every round that has ended, with the sketch of its model.
            go_on: asked a few times a second.

        Raises:
            RunError: training has diverged; or, if `strict`, a message was missed.
            NeighbourGone: if `strict`, a neighbour was lost.
        """
        self._clock = time.perf_counter()
        try:
            self._tell(Started())
            while go_on() and not (self._stopped and not self._results):
                self._turn()
                for row, mark in self._finished_rows():
                    on_row(row, mark)
        finally:
            self._task.halt()
            self._worker.submit(self._close_waker)
            self._worker.shutdown()
            self.links.poller.unregister(self._wake)
            self._wake.close(0)
        for row, mark in self._finished_rows(also_waiting=True):
            on_row(row, mark)
        reason = self._stopped or "interrupted"
        rejected = self.links.rejected.total()
        return Ending(
            self.machine.params,
            self._nodes,
            reason,
            self._updates,
            missed=self._missed,
            rejected=rejected,
        )

    def _submit(self, effect: Train | Evaluate) -> None:
        """Let the worker do something, and then wake us: not before the result is there."""
        self._results.append(self._worker.submit(self._work, effect))
        self._worker.submit(self._wake_up)

    def _open_waker(self) -> None:
        self._waker = self.links.waker(self._name)

    def _wake_up(self) -> None:
        self._waker.send(b"")

    def _close_waker(self) -> None:
        self._waker.close(0)

    def _turn(self) -> None:
        due = self._timers[0][0] if self._timers else math.inf
        self.links.poller.poll(self.links.until_due(due, NAP))
        with contextlib.suppress(zmq.Again):
            while True:
                self._wake.recv(zmq.NOBLOCK)
        while self._results and self._results[0].done():
            event = self._results.pop(0).result()
            if isinstance(event, Evaluated):
                self._evaluated(event)
            self._tell(event)
        for event in self.links.events():  # all input before any timer
            if self.strict and isinstance(event, PeerDown) and not self._stopped:
                raise NeighbourGone(f"peer {self.node}: lost peer {event.peer}")
            self._tell(event)
        while self._timers and self._timers[0][0] <= time.monotonic():
            self._tell(TimerFired(heapq.heappop(self._timers)[1]))

    def _tell(self, event: Event) -> None:
        try:
            effects = self.machine.handle(event)
        except RemoteProtocolError as error:
            self.links.reject(error)
            return
        for effect in effects:
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Train():
                self._updates += effect.count
                self._submit(effect)
            case Evaluate(round=number):
                self._evaluating.add(number)
                self._submit(effect)
            case Send():
                self._sent[effect.round] += len(effect.to) * wire.size(self.node, effect)
                self.links.send(effect)
            case SetTimer(after=after, round=number):
                heapq.heappush(self._timers, (time.monotonic() + after, number))
            case Report():
                if self.strict and effect.missed:
                    who = ", ".join(f"peer {peer}" for peer in effect.missed)
                    raise RunError(f"peer {self.node}: nothing heard in time of {who}")
                self._missed += len(effect.missed)
                self._rows[effect.round] = (self._row(effect), sketch(effect.params))
            case Stop(reason=reason):
                self._stopped = reason

    def _row(self, report: Report) -> Row:
        return Row(
            round=report.round,
            node=self.node,
            train_loss=report.loss,
            eval_loss=math.nan,
            eval_acc=math.nan,
            num_examples=self._examples,
            consensus_distance=math.nan,
            bytes_sent=self._sent.pop(report.round, 0),
            bytes_received=report.received,
            wall_s=time.perf_counter() - self._clock,
            virtual_s=math.nan,
        )

    def _finished_rows(self, also_waiting: bool = False) -> list[tuple[Row, Tensor]]:
        """Take out the rows whose evaluation is done, or was not asked for."""
        waiting = set() if also_waiting else self._evaluating
        return [self._rows.pop(number) for number in sorted(self._rows.keys() - waiting)]

    def _evaluated(self, event: Evaluated) -> None:
        row, mark = self._rows[event.round]
        self._rows[event.round] = (row._replace(eval_loss=event.loss, eval_acc=event.acc), mark)
        self._evaluating.discard(event.round)

    def _work(self, effect: Train | Evaluate) -> Event:
        if isinstance(effect, Evaluate):
            loss, acc = self._task.evaluate(effect.params, self._nodes)
            return Evaluated(effect.round, loss.item(), acc.item())
        first, count = torch.tensor([effect.step]), torch.tensor([effect.count])
        algorithm = self.setup.algorithm
        state, mean = train(algorithm, self._task, effect.state, self._nodes, first, count)
        return Trained(effect.step, state, mean.item())
