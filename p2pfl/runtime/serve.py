"""Runtime three: one peer, its sockets and the real clock."""

from __future__ import annotations

import dataclasses
import heapq
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Inbox, newest
from p2pfl.errors import RemoteProtocolError, RunError
from p2pfl.learning.scratch import keep_freed_memory
from p2pfl.learning.tree import wide
from p2pfl.peer.events import (
    Discard,
    Effect,
    Evaluate,
    Evaluated,
    Event,
    PeerDown,
    Position,
    Received,
    Report,
    Send,
    SetTimer,
    Skip,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.peer.letters import Letters
from p2pfl.peer.mail import is_replaceable
from p2pfl.peer.plan import Pace
from p2pfl.peer.rounds import TIME_IS_UP, Peer
from p2pfl.runtime import chunks, flows, parts
from p2pfl.runtime.conserved import watched
from p2pfl.runtime.handshake import NeighbourGone
from p2pfl.runtime.later import Later, later, postponed
from p2pfl.runtime.links import Links
from p2pfl.runtime.reader import Asked
from p2pfl.runtime.rows import Rows
from p2pfl.runtime.setup import Ending, Row, Setup
from p2pfl.runtime.sockets import NOT_ADMITTED
from p2pfl.runtime.streams import Stream, streaming, wide_field
from p2pfl.runtime.wire import TRAINING
from p2pfl.runtime.worker import Give, Given, Keep, Kept, Result, Worker

# How long the loop may sleep: a signal (Ctrl-C) is noticed after so many milliseconds.
NAP = 250

CPU = torch.device("cpu")

OnRow = Callable[[Row, Tensor], None]  # with sketches, see `Marked`
OnEvent = Callable[..., None]  # its kind, and what belongs to it by name


class Part(NamedTuple):
    """What part a peer takes.

    Attributes:
        phase: what messages are marked with.
        strict: every message is needed: a neighbour lost, or a message missed, is an error.
        begin: where it goes on, if others have begun before.
        keep: writes checkpoints, in the worker; None: there are none.
        constants: what who comes late needs to know besides a model, ``[1, ...]`` each.
        elapsed: seconds for which the run has been going on.
    """

    phase: int = TRAINING
    strict: bool = False
    begin: Position | None = None
    keep: Keep | None = None
    constants: tuple[Tensor, ...] = ()
    elapsed: float = 0.0


class Server:
    """Carry out the effects of one peer and tell it what happens.

    The loop waits for the network, the clock and the worker thread, and never for training:
    what is heard is mixed, local steps are taken and models are evaluated one after the other
    in the worker.

    Args:
        setup: what is run.
        node: as which node.
        links: to its neighbours, whom it has met.
        part: what part it takes.
    """

    def __init__(self, setup: Setup, node: int, links: Links, part: Part | None = None) -> None:
        keep_freed_memory()
        self.setup, self.node, self.links, self.part = setup, node, links, part or Part()
        self._nodes = torch.tensor([node])
        self._device = setup.task.init(self._nodes).device
        schema = chunks.schema(setup.message(node), setup.algorithm.needs.counts)
        heard = max((len(hears) for hears in self._heard_in_a_period()), default=0)
        self._news = threading.Condition() if self._can_stream(schema, heard) else None
        self._algorithm = setup.algorithm
        if self._news:
            hooks = (self._out_of_patience, self._more_room, links.pool.empty)
            self._algorithm = streaming(setup.algorithm, *hooks)
        drift = watched(setup)
        self._algorithm = drift.watch(self._algorithm) if drift else self._algorithm
        lazy = postponed(self._algorithm)._replace(receive=self._receive)
        if begin := self.part.begin:
            begin = begin._replace(state=Later(self._algorithm, begin.state))
        self.machine = dataclasses.replace(setup, algorithm=lazy).peer(node, begin)
        stay = self._keeps_nothing and parts.can_stay(schema, heard)
        links.expect(self.part.phase, schema, self._replaceable, stay, self._news, heard)
        self._rows = Rows(node, int(setup.task.examples(self._nodes)[0]))
        how = (self._algorithm, setup.task, node, links, f"worker-{self.part.phase}")
        self._worker = Worker(*how, self.part.keep or (lambda position: None), drift)
        self._giving: set[int] = set()  # who is to be given a model
        self._timers: list[tuple[float, int]] = []
        self._missed, self._one_sided, self._spoke = 0, 0, 0.0
        self._stopped = ""

    @property
    def _replaceable(self) -> bool:
        """Whether a newer message makes an unsent older one worthless.

        In step every round's message is waited for, however far its receiver is behind.
        """
        pace = self.setup.pace
        in_step = isinstance(pace, Pace) and pace.patience == math.inf
        waits = in_step or self.part.strict
        return is_replaceable(self.setup.algorithm) and not waits

    @property
    def _keeps_nothing(self) -> bool:
        """Whether models are read in their exchange alone, and here: nothing is kept of them."""
        algorithm, mixing = self.setup.algorithm, self.setup.mixing
        return algorithm.absorb is newest and mixing.conserves == "mean" and self._device == CPU

    def _can_stream(self, schema: chunks.Schema, heard: int) -> bool:
        """Say whether models are mixed while they arrive, for want of room for all of them.

        That asks for an algorithm which treats every parameter by itself, and for time: who
        does not wait, or trains meanwhile, has to keep what comes.
        """
        pace = self.setup.pace
        return (
            self._keeps_nothing
            and heard * schema.nbytes > flows.BUDGET
            and isinstance(pace, Pace)
            and pace.patience > 0
            and not pace.overlap
            and self.setup.algorithm.columnwise
            and wide_field(schema) is not None
        )

    def _heard_in_a_period(self) -> list[tuple[int, ...]]:
        topology = self.setup.topology
        return [topology.view(self.node, round)[1] for round in range(topology.period or 1)]

    def run(
        self,
        on_row: OnRow,
        go_on: Callable[[], bool] = lambda: True,
        on_event: OnEvent = lambda kind, **about: None,
    ) -> Ending:
        """Serve until the peer is done, or `go_on` says no.

        Args:
            on_row: told of every round that has ended, with its sketches.
            go_on: asked a few times a second.
            on_event: told of checkpoints, and of what it has noticed of the others.

        Raises:
            RunError: training has diverged; or, if `strict`, a message was missed.
            NeighbourGone: if `strict`, a neighbour was lost.
        """
        self._on_event = on_event
        self._began = time.monotonic() - self.part.elapsed
        self._rows.start(self.part.elapsed)
        try:
            for absent in self._absent():
                self._tell(PeerDown(absent))
            self._tell(Started())
            while go_on() and not (self._stopped and not self._worker.is_busy):
                self._turn()
                self._tell_noticed()
                for row, mark in self._rows.finished():
                    on_row(row, mark)
            for result in self._worker.done():  # also what came while it was asked to stop
                self._rows.note(result)
        finally:
            self._worker.close()
        for row, mark in self._rows.finished(at_the_end=True):
            on_row(row, mark)
        return Ending(
            later(self.machine.params).params,
            self._nodes,
            self._stopped or "interrupted",
            self.machine.step,
            missed=self._missed,
            rejected=self.links.rejected.total(),
            one_sided=self._one_sided,
            mass=self.setup.mass(self._nodes, [self.machine.position.state.now()]),
        )

    def _tell_noticed(self) -> None:
        """Pass on what has become known of the others."""
        for peer in self.links.refusing():
            self._on_event("refused", peer=peer, reason=NOT_ADMITTED)
        if self.links.lookout and not self.part.strict:
            for at, peer, status in self.links.lookout.noticed:
                self._on_event("noticed", at=at, peer=peer, status=status.name.lower())
            self.links.lookout.noticed.clear()

    def _absent(self) -> list[int]:
        """Return who is not there when we begin."""
        if self.links.lookout is None or self.part.strict:
            return []
        live = self.links.lookout.live
        return [peer for peer in range(self.setup.topology.n) if peer not in live]

    def _receive(self, state: Later, inbox: Inbox[Any]) -> Later:
        """Put off an exchange until the worker gets to it."""
        self.links.begin(row for field in inbox.heard for row in field if isinstance(row, Stream))
        # Streams take memory for what comes of them by themselves.
        if self._news is None and isinstance(inbox, Letters) and self._device == CPU:
            params = self.setup.task.init(self._nodes[:0])
            inbox.into.append(self.links.pool.empty((1, params.shape[1]), wide(params)))
        return Later(self._algorithm, state.now(), inbox)

    def _out_of_patience(self) -> float:
        """Return when (monotonic) the models of this round are waited for no longer."""
        pace = self.setup.pace
        return self._spoke + (pace.patience if isinstance(pace, Pace) else math.inf)

    def _more_room(self) -> None:
        """Let more chunks be asked for; called by the worker."""
        self._worker.wake()

    def _turn(self) -> None:
        due = self._timers[0][0] if self._timers else math.inf
        self.links.wait(due, NAP)
        for result in self._worker.done():
            self._done(result)
        for event in self.links.events():  # all input before any timer
            if isinstance(event, Asked):
                self._give(event.peer)
                continue
            if self.part.strict and isinstance(event, PeerDown) and not self._stopped:
                raise NeighbourGone(f"peer {self.node}: lost peer {event.peer}")
            self._tell(self._placed(event))
        while self._timers and self._timers[0][0] <= time.monotonic():
            self._tell(TimerFired(heapq.heappop(self._timers)[1]))

    def _give(self, peer: int) -> None:
        """Give a peer our model, once we have time to work it out."""
        if peer not in self._giving and not self.part.strict:
            self._giving.add(peer)
            self._worker.do(Give(peer, self.machine.round, self.machine.params))

    def _placed(self, event: Event) -> Event:
        """Return an event whose message lies where we compute."""
        if not isinstance(event, Received) or self._device == CPU:
            return event
        blocks = [block.to(self._device) for block in event.message]
        return dataclasses.replace(event, message=type(event.message)(*blocks))

    def _done(self, result: Result) -> None:
        """Take in what the worker has done."""
        self._rows.note(result)
        match result:
            case Kept(kind=kind, fields=fields):
                self._on_event(kind, **fields)
            case Given(to=to, round=round, model=params):
                self._giving.discard(to)
                message = (params.cpu(), *self.part.constants)
                self.links.offer(to, round, message, time.monotonic() - self._began)
            case Trained() | Evaluated():
                self._tell(result)

    def _tell(self, event: Event) -> None:
        try:
            effects = self.machine.handle(event)
        except RemoteProtocolError as error:
            sender = event.sender if isinstance(event, Received) else None
            self.links.reject(error, sender)
            if isinstance(event, Received):
                _drop(event.message)
            return
        for effect in effects:
            self._carry_out(effect)
        if self._news and isinstance(self.machine, Peer):
            self.links.make_way(self.machine.awaited, self.machine.round)

    def _carry_out(self, effect: Effect) -> None:  # noqa: C901 - a line for each
        match effect:
            case Train():
                self._worker.do(effect)
            case Evaluate(round=number):
                self._rows.wait_for(number)
                self._worker.do(effect)
            case Send():
                self._send(effect)
            case Skip():
                self.links.skip(effect)
            case Discard(message=message):
                _drop(message)
            case SetTimer(after=after, round=number):
                since = self._began if number == TIME_IS_UP else time.monotonic()
                heapq.heappush(self._timers, (since + after, number))
            case Report():
                self._report(effect)
            case Stop(reason=reason):
                self._stopped = reason

    def _send(self, send: Send) -> None:
        self._spoke = time.monotonic()
        self._rows.sent(send.round, len(send.to) * chunks.size(self.node, send))
        self.links.send(send)

    def _report(self, report: Report) -> None:
        if self.part.strict and report.missed:
            who = ", ".join(f"peer {peer}" for peer in report.missed)
            raise RunError(f"peer {self.node}: nothing heard in time of {who}")
        self._missed += len(report.missed)
        self._one_sided += report.one_sided
        if self.links.lookout:
            self.links.lookout.ended_round(report.round)
        self._rows.add(report)
        self._worker.do(report)
        if self.part.keep:
            self._worker.do(self.machine.position)


def _drop(message: tuple[Tensor, ...]) -> None:
    """Give free what an unused message still takes up."""
    for field in message:
        if isinstance(field, Stream):
            field.drop()
