"""A peer in rounds, as a state machine: no clock, no sockets, no threads.

A round of a peer is

    TRAINING --Trained--> WAITING --all heard, or out of patience--> TRAINING ...

and the machine moves only inside `Peer.handle`. `patience` is how long it waits for its
neighbours after sending: for ever makes rounds synchronous, zero makes the peer
asynchronous (it takes what has come), anything between is a deadline. A neighbour that
misses a deadline is not waited for again until it has caught up, so whoever dies or
freezes costs the others one deadline in all. A neighbour that has run far ahead is not
waited for either: its newest model is taken for what it is.

With `overlap` the local steps of the next round are taken while it waits, from the model
that was sent, and what they have changed is carried over to what came of the exchange. A
round still ends when all are heard; TRAINING is then what is left of those steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Generic, NamedTuple

from torch import Tensor

from p2pfl.algorithm import Algorithm, M, R, Rows, S
from p2pfl.errors import LocalProtocolError, RemoteProtocolError, diverged
from p2pfl.peer.events import (
    Effect,
    Evaluate,
    Evaluated,
    Event,
    PeerDown,
    PeerId,
    PeerUp,
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
from p2pfl.peer.mail import Mail
from p2pfl.peer.stopping import Agreement, StopRule
from p2pfl.topology.mixing import Mixing

# How many messages of one sender may lie unopened. Where links go both ways, a sender in
# step is at most one round ahead; only a peer which has fallen far behind ever reaches this,
# and it must not be drowned in models that it will never mix.
BACKLOG = 8
TIME_IS_UP = -1  # the number of the timer that runs once, in place of a round's


class Phase(Enum):
    """What a peer is doing."""

    IDLE = "idle"
    TRAINING = "training"
    WAITING = "waiting"
    DONE = "done"


class View(NamedTuple):
    """Whom a peer talks to in a round."""

    sends_to: tuple[PeerId, ...]
    hears_from: tuple[PeerId, ...]


class Pace(NamedTuple):
    """How long a peer goes on, and how long it waits for the others.

    Attributes:
        rounds: the most rounds it takes.
        steps: local steps in a round.
        patience: seconds to wait for neighbours after sending; 0 or ``inf`` allowed.
        evaluate_every: measure the model after every so many rounds, and after the last;
            0: never.
        stop: when to stop before that, or None.
        width: rounds after which what anybody said has reached everybody.
        backlog: unopened messages of one sender that are kept, where only the newest counts
            and patience is finite.
        seconds: begin no further round after so many.
        overlap: take the local steps of the next round while waiting; the algorithm must
            have a `carry`.
    """

    rounds: int
    steps: int = 1
    patience: float = math.inf
    evaluate_every: int = 1
    stop: StopRule | None = None
    width: int = 1
    backlog: int = BACKLOG
    seconds: float = math.inf
    overlap: bool = False


class Peer(Generic[S, M, R]):
    """One node of the system: a block with a single row and its mail."""

    def __init__(
        self,
        algorithm: Algorithm[S, M, R],
        mixing: Mixing,
        views: Callable[[int], View],
        pace: Pace,
        params: Tensor,
        rows: Rows,
    ) -> None:
        self.me: PeerId = int(rows.nodes[0])
        self.algorithm, self.pace = algorithm, pace
        self.state = algorithm.init(params, rows)
        self.phase, self.round, self.step = Phase.IDLE, 0, 0
        backlog = pace.backlog if pace.patience < math.inf else None
        self.mail = Mail(self.me, algorithm, mixing, params.shape[1], backlog)
        self._views = lru_cache(maxsize=2)(views)
        self._gone: set[PeerId] = set()  # left, or presumed dead
        self._late: set[PeerId] = set()  # missed a deadline and have not caught up
        self._view = View((), ())
        self._patient, self._out_of_time = True, False
        self._training = False  # whether a `Train` is unanswered
        self._trained: Trained | None = None  # an answer that is not made use of yet
        self._sent: S | None = None  # what it started from, if the exchange goes on meanwhile
        self._unjudged = False  # whether the next score asks for an `Evaluated` first
        self._loss = math.nan
        self._agreement = Agreement(pace.stop, pace.width)

    @property
    def params(self) -> Tensor:
        """The current model, ``[1, d]``."""
        return self.algorithm.model(self.state)

    def handle(self, event: Event) -> list[Effect]:
        """Take in one event and return the effects it calls for; see `Machine`."""
        match event:
            case Started():
                limit = [SetTimer(self.pace.seconds, TIME_IS_UP)]
                self.phase = Phase.TRAINING
                return [*(limit if self.pace.seconds < math.inf else []), *self._train()]
            case Trained():
                return self._take_trained(event)
            case Evaluated():
                self._agreement.measured("eval_loss", event.loss)
                self._agreement.measured("eval_acc", event.acc)
                self._unjudged = False
                return self._try_speak()
            case Received():
                return self._receive(event)
            case TimerFired(round=number):
                self._out_of_time |= number == TIME_IS_UP
                self._patient &= number != self.round
                return self._try_close()
            case PeerUp(peer=peer):
                self._gone.discard(peer)
                return []
            case PeerDown(peer=peer):
                self._gone.add(peer)
                return self._try_close()

    def _train(self) -> list[Effect]:
        self._training = True
        return [Train(self.step, self.pace.steps, self.state)]

    def _take_trained(self, event: Trained) -> list[Effect]:
        if not self._training or event.step != self.step:
            raise LocalProtocolError(f"step {event.step} trained while {self.phase.value}")
        self._training, self._trained = False, event
        return self._try_speak()

    def _try_speak(self) -> list[Effect]:
        """Send, and wait, if the last round is over and the local steps of this one are done."""
        done = self._trained
        if self.phase is not Phase.TRAINING or done is None or self._unjudged:
            return []
        if self.pace.steps and not math.isfinite(done.loss):
            raise diverged(self.me, f"in round {self.round}", done.loss)
        self.state, self._loss = self._carried(done.state), done.loss
        self.step += self.pace.steps
        self._trained = self._sent = None
        self.phase, self._patient = Phase.WAITING, self.pace.patience > 0
        effects = self._speak()
        if self.pace.overlap and not self._is_last:
            self._sent = self.state
            effects += self._train()
        return [*effects, *self._try_close()]

    def _carried(self, trained: S) -> S:
        """Return the state after local steps that an exchange may have gone along with."""
        if self._sent is None:
            return trained
        assert self.algorithm.carry is not None
        return self.algorithm.carry(self._sent, trained, self.state)

    def _speak(self) -> list[Effect]:
        # The view is fixed here for the whole round: both ends of a link reckon with the
        # degrees that were announced, whatever happens to a third peer meanwhile.
        sends_to, hears_from = self._views(self.round)
        self._view = View(
            tuple(p for p in sends_to if p not in self._gone),
            tuple(p for p in hears_from if p not in self._gone or self.mail.unopened.get(p)),
        )
        self._agreement.measured("train_loss", self._loss)
        degree, message = len(self._view.sends_to), self.algorithm.send(self.state)
        self.mail.remember(self.me, degree, message)
        score = self._agreement.begin(self.round)
        effects: list[Effect] = [Send(self._view.sends_to, self.round, degree, score, message)]
        if 0 < self.pace.patience < math.inf:
            effects.append(SetTimer(self.pace.patience, self.round))
        return effects

    def _receive(self, event: Received) -> list[Effect]:
        sender = event.sender
        if sender not in self._views(event.round).hears_from:
            raise RemoteProtocolError(f"{sender} is not a neighbour in round {event.round}")
        self.mail.put(event, self.round)
        # A model of the last round, come while we train for the next, is as good as in time:
        # whose wait for a third peer made us wait in vain is in step again.
        if event.round + (self.phase is Phase.TRAINING) >= self.round:
            self._late.discard(sender)
        return self._try_close()

    def _try_close(self) -> list[Effect]:
        if self.phase is not Phase.WAITING:
            return []
        missing = []
        for peer in self._view.hears_from:
            if self.mail.has_come(peer, self.round):
                continue
            if self._patient and peer not in self._gone and peer not in self._late:
                return []
            missing.append(peer)
        return self._close(tuple(missing) if self.pace.patience else ())

    def _close(self, missing: tuple[PeerId, ...]) -> list[Effect]:
        self._late.update(missing)
        opened = self.mail.open(self._view.hears_from, self.round, not self.pace.patience)
        self.state = self.algorithm.receive(self.state, opened.inbox)
        self._take_scores(opened.scores)
        together = self._agreement.reached(self.round)
        last = together or self._is_last
        missed = tuple(p for p in missing if p not in self._gone)
        report = Report(self.round, self._loss, self.params, opened.received, missed)
        effects: list[Effect] = [report]
        every, stop = self.pace.evaluate_every, self.pace.stop
        if every and (last or (self.round + 1) % every == 0):
            effects.append(Evaluate(self.round, self.params))
            self._unjudged = stop is not None and stop.metric != "train_loss"
        self.round += 1
        if last:
            self.phase = Phase.DONE
            return [*effects, Stop(self._reason(together))]
        self.phase = Phase.TRAINING
        return [*effects, *(self._try_speak() if self.pace.overlap else self._train())]

    @property
    def _is_last(self) -> bool:
        """Whether no round comes after this one, whatever the others say."""
        return self._out_of_time or self.round + 1 >= self.pace.rounds

    def _reason(self, together: bool) -> str:
        if together:
            return "converged"
        return "all rounds done" if self.round >= self.pace.rounds else "out of time"

    def _take_scores(self, scores: dict[PeerId, list[float]]) -> None:
        for peer, said in scores.items():
            for score in said:
                self._agreement.heard(score)
            if not said and peer not in self._gone:
                self._agreement.missed()
