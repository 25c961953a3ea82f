"""A peer without rounds: push to one neighbour on a timer, merge whatever comes.

The same `Algorithm` runs here as in `Peer`; only the order of events differs. A model that
arrives during a local step is merged when the step is done. A peer to which nothing comes
trains once a period all the same.
"""

from __future__ import annotations

import math
import random
from typing import Generic, NamedTuple, cast

from torch import Tensor

from p2pfl.algorithm import Algorithm, M, Rows, S
from p2pfl.errors import LocalProtocolError, RemoteProtocolError, diverged
from p2pfl.peer.company import Company
from p2pfl.peer.events import (
    Effect,
    Evaluate,
    Evaluated,
    Event,
    PeerDown,
    PeerId,
    PeerSuspected,
    PeerUp,
    Position,
    Received,
    Report,
    Send,
    SetTimer,
    Skipped,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.peer.letters import unstacked
from p2pfl.peer.plan import Views


class Tempo(NamedTuple):
    """How often a peer speaks up, and how many times in all.

    Attributes:
        period: seconds between two pushes.
        ticks: how many pushes.
        steps: local steps after each merge, or in a period without one.
        evaluate_every: measure the model at every so many pushes, and after the last; 0:
            never.
        seed: draws whom to push to.
    """

    period: float
    ticks: int
    steps: int = 1
    evaluate_every: int = 1
    seed: int = 0


class Gossiper(Generic[S, M]):
    """One node of asynchronous gossip learning (Ormándi et al. 2013)."""

    def __init__(
        self,
        algorithm: Algorithm[S, M, M],
        views: Views,
        tempo: Tempo,
        params: Tensor,
        rows: Rows,
        begin: Position | None = None,
    ) -> None:
        self.me: PeerId = int(rows.nodes[0])
        self.algorithm, self.tempo = algorithm, tempo
        begin = begin or Position(0, 0, algorithm.init(params, rows))
        self.round, self.step, self.state = begin
        self._views, self._company = views, Company()
        self._training, self._idle = False, True  # idle: no mail to train on since a push
        self._done = False
        self._mail: dict[PeerId, Received] = {}  # the newest of each sender, unmerged
        self._loss, self._received_bytes = math.nan, 0
        self._random = random.Random(f"{tempo.seed} {self.me}")

    @property
    def params(self) -> Tensor:
        """The current model, ``[1, d]``."""
        return self.algorithm.model(self.state)

    @property
    def position(self) -> Position:
        """Where it stands."""
        return Position(self.round, self.step, self.state)

    def handle(self, event: Event) -> list[Effect]:
        """Take in one event and return the effects it calls for; see `Machine`."""
        if self._done:
            return []
        match event:
            case Started():
                return [SetTimer(self.tempo.period, self.round), *self._train()]
            case Trained():
                return self._trained(event)
            case Received():
                return self._receive(event)
            case TimerFired(round=tick):
                return self._push(tick)
            case PeerUp() | PeerSuspected() | PeerDown():
                self._company.note(event, self.round)
            case Evaluated() | Skipped():
                pass  # there are no rounds in which anybody could be left out
        return []

    def _receive(self, event: Received) -> list[Effect]:
        hears_from = self._views.of(0, self._company.absent(self.round)).hears_from
        if event.sender not in hears_from and not self._views.follow:
            raise RemoteProtocolError(f"{event.sender} is not a neighbour")
        self._received_bytes += event.size
        self._mail[event.sender] = event
        return self._train()

    def _trained(self, event: Trained) -> list[Effect]:
        if not self._training or event.step != self.step:
            raise LocalProtocolError(f"step {event.step} trained, which nobody asked for")
        if self.tempo.steps and not math.isfinite(event.loss):
            raise diverged(self.me, f"at step {event.step}", event.loss)
        self.state, self._loss, self._training = event.state, event.loss, False
        self.step += self.tempo.steps
        return self._train() if self._mail else []

    def _train(self) -> list[Effect]:
        if self._training:
            return []
        # In the order of the ids; one at a time, as they came, where each is trained by itself.
        single = self.algorithm.needs.single
        for sender in list(self._mail)[:1] if single else sorted(self._mail):
            self._merge(cast(M, self._mail.pop(sender).message))
        self._training, self._idle = True, False
        return [Train(self.step, self.tempo.steps, self.state)]

    def _merge(self, theirs: M) -> None:
        mine = self.algorithm.send(self.state)
        self.state = self.algorithm.receive(self.state, unstacked((0.5, 0.5), (mine, theirs), 0))

    def _push(self, tick: int) -> list[Effect]:
        effects: list[Effect] = []
        company = self._company
        sends_to = self._views.of(0, company.absent(tick)).sends_to
        neighbours = [p for p in sends_to if company.is_there(p)]
        if neighbours:
            to = self._random.choice(neighbours)
            effects.append(Send((to,), tick, 1, -math.inf, self.algorithm.send(self.state)))
        effects.append(Report(tick, self._loss, self.params, self._received_bytes))
        self._received_bytes, self.round = 0, tick + 1
        last = tick + 1 >= self.tempo.ticks
        every = self.tempo.evaluate_every
        if every and (last or (tick + 1) % every == 0):
            effects.append(Evaluate(tick, self.params))
        if last:
            self._done = True
            return [*effects, Stop("all ticks done")]
        effects += [SetTimer(self.tempo.period, tick + 1), *(self._train() if self._idle else [])]
        self._idle = True
        return effects
