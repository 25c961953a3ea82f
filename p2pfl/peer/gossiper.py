"""A peer without rounds: push to one neighbour on a timer, merge whatever comes.

The same `Algorithm` runs here as in `Peer`; only the order of events differs. A model that
arrives during a local step is merged when the step is done. A peer to which nothing comes
trains once a period all the same.

Where a mass is conserved, a push is half of it, kept account of in a `Ledger`: messages are running
sums, so what is lost comes with the next one. A half is given away at once, also during a local
step, whose change is then carried over to the half that is left.
"""

from __future__ import annotations

import math
import random
from typing import Generic, NamedTuple, cast

from torch import Tensor

from p2pfl.algorithm import Algorithm, M, Rows, S
from p2pfl.errors import LocalProtocolError, RemoteProtocolError, diverged
from p2pfl.learning.tree import tree_map
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
from p2pfl.peer.ledger import Ledger, typed
from p2pfl.peer.letters import unstacked
from p2pfl.peer.plan import Views, is_measured

HALVES = 8  # of a mass, given away one after the other while nothing is heard


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
        self._began = self.state  # where the last local steps did
        self._shares = algorithm.needs.weights == "mass"
        self.ledger: Ledger[M] = Ledger()  # used where a mass is conserved
        self._newest: dict[PeerId, int] = {}  # likewise: the last push of each sender
        self._halved = 0  # likewise: pushes since anything was heard
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
                self._note(event)
            case Evaluated() | Skipped():
                pass  # there are no rounds in which anybody could be left out
        return []

    def _receive(self, event: Received) -> list[Effect]:
        hears_from = self._views.of(0, self._company.absent(self.round)).hears_from
        if event.sender not in hears_from and not self._views.follow:
            raise RemoteProtocolError(f"{event.sender} is not a neighbour")
        if self._shares:
            # An older sum would take back what a newer one has brought.
            if event.round <= self._newest.get(event.sender, -1):
                raise RemoteProtocolError(f"{event.sender} pushed {event.round} again, or late")
            self._newest[event.sender] = event.round
            self.ledger.heard(event.sender)
        self._received_bytes += event.size
        self._mail[event.sender] = event
        return self._train()

    def _note(self, event: PeerUp | PeerSuspected | PeerDown) -> None:
        """Take note of who is there; sums of who begins anew mean nothing any more."""
        peer = event.peer
        if self._shares and isinstance(event, PeerDown) and not event.done:
            self._take_back(peer)
        if self._shares and isinstance(event, PeerUp) and event.anew:
            self._mail.pop(peer, None)
            self._newest.pop(peer, None)
            self.ledger.forget(peer)
        self._company.note(event, self.round)

    def _trained(self, event: Trained) -> list[Effect]:
        if not self._training or event.step != self.step:
            raise LocalProtocolError(f"step {event.step} trained, which nobody asked for")
        if self.tempo.steps and not math.isfinite(event.loss):
            raise diverged(self.me, f"at step {event.step}", event.loss)
        trained = event.state
        if self.state is not self._began:  # some of it was given away meanwhile
            assert self.algorithm.carry is not None
            trained = self.algorithm.carry(self._began, trained, self.state)
        self.state = self._began = trained
        self._loss, self._training = event.loss, False
        self.step += self.tempo.steps
        return self._train() if self._mail else []

    def _train(self) -> list[Effect]:
        if self._training:
            return []
        # In the order of the ids; one at a time, as they came, where each is trained by itself.
        single = self.algorithm.needs.single
        for sender in list(self._mail)[:1] if single else sorted(self._mail):
            self._merge(sender, cast(M, self._mail.pop(sender).message))
        self._training, self._idle, self._began = True, False, self.state
        return [Train(self.step, self.tempo.steps, self.state)]

    def _merge(self, sender: PeerId, theirs: M) -> None:
        mine, weights = self.algorithm.send(self.state), (0.5, 0.5)
        if self._shares:
            new, self._halved, weights = self.ledger.take(sender, theirs), 0, (1.0, 1.0)
            if new is None:
                return
            theirs = typed(new, mine)
        self.state = self.algorithm.receive(self.state, unstacked(weights, (mine, theirs), 0))

    def _take_back(self, peer: PeerId) -> None:
        if share := self.ledger.take_back(peer):
            mine = self.algorithm.send(self.state)
            inbox = unstacked((1.0, 1.0), (mine, typed(share, mine)), 0)
            self.state = self.algorithm.receive(self.state, inbox)

    def _said(self, to: PeerId, answers: bool) -> M:
        """Return what a push consists of; of a mass it is half, and the other half is left."""
        mine = self.algorithm.send(self.state)
        if not self._shares:
            return mine
        # Who hears nobody would run out of it. It repeats what it has given before.
        share = 0.5 if self._halved < HALVES and not self.ledger.owes(to) else 0.0
        self._halved += 1
        self.state = self.algorithm.receive(self.state, unstacked((1 - share,), (mine,), 0))
        half = tree_map(lambda part: part * share, mine)
        return self.ledger.lend(to, half) if share and answers else self.ledger.give(to, half)

    def _push(self, tick: int) -> list[Effect]:
        effects: list[Effect] = []
        company = self._company
        view = self._views.of(0, company.absent(tick))
        neighbours = [p for p in view.sends_to if company.is_there(p)]
        if neighbours:
            to = self._random.choice(neighbours)
            said = self._said(to, to in view.hears_from)
            effects.append(Send((to,), tick, 1, -math.inf, said))
        effects.append(Report(tick, self._loss, self.params, self._received_bytes))
        self._received_bytes, self.round = 0, tick + 1
        last = tick + 1 >= self.tempo.ticks
        if is_measured(self.tempo.evaluate_every, tick, last):
            effects.append(Evaluate(tick, self.params))
        if last:
            self._done = True
            return [*effects, Stop("all ticks done")]
        effects += [SetTimer(self.tempo.period, tick + 1), *(self._train() if self._idle else [])]
        self._idle = True
        return effects
