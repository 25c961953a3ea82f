"""A peer in rounds, as a state machine: no clock, no sockets, no threads.

A round of a peer is

    TRAINING --Trained--> WAITING --all heard, or out of patience--> TRAINING ...

and the machine moves only inside `Peer.handle`. `patience` is how long it waits for its
neighbours after sending: for ever makes rounds synchronous, zero makes the peer
asynchronous (it takes what has come), anything between is a deadline. A neighbour that
misses a deadline is not waited for again until it has caught up, so whoever dies or
freezes costs the others one deadline in all. A neighbour that has run far ahead is not
waited for either: its newest model is taken for what it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Generic, NamedTuple, cast

from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, M, R, Rows, S, newest
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
from p2pfl.peer.letters import unstacked
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
    """

    rounds: int
    steps: int = 1
    patience: float = math.inf
    evaluate_every: int = 1
    stop: StopRule | None = None
    width: int = 1
    backlog: int = BACKLOG
    seconds: float = math.inf


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
        self.algorithm, self.mixing, self.pace = algorithm, mixing, pace
        self.state = algorithm.init(params, rows)
        self.phase, self.round, self.step = Phase.IDLE, 0, 0
        self._views, self._width = lru_cache(maxsize=2)(views), params.shape[1]
        self._mail: dict[PeerId, deque[Received]] = {}
        self._newest: dict[PeerId, int] = {}  # the last round heard of each sender
        self._heard: dict[PeerId, tuple[int, R]] = {}  # (degree, memory) of each sender
        self._gone: set[PeerId] = set()  # left, or presumed dead
        self._late: set[PeerId] = set()  # missed a deadline and have not caught up
        self._outran: set[PeerId] = set()  # so far ahead that their mail overflowed
        self._view = View((), ())
        self._patient, self._out_of_time = True, False
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
                return [*(limit if self.pace.seconds < math.inf else []), *self._train()]
            case Trained():
                return self._trained(event)
            case Evaluated():
                self._agreement.measured("eval_loss", event.loss)
                self._agreement.measured("eval_acc", event.acc)
                return []
            case Received():
                return self._received(event)
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
        self.phase = Phase.TRAINING
        return [Train(self.step, self.pace.steps, self.state)]

    def _trained(self, event: Trained) -> list[Effect]:
        if self.phase is not Phase.TRAINING or event.step != self.step:
            raise LocalProtocolError(f"step {event.step} trained while {self.phase.value}")
        if self.pace.steps and not math.isfinite(event.loss):
            raise diverged(self.me, f"in round {self.round}", event.loss)
        self.state, self._loss = event.state, event.loss
        self.step += self.pace.steps
        self.phase, self._patient = Phase.WAITING, self.pace.patience > 0
        return [*self._speak(), *self._try_close()]

    def _speak(self) -> list[Effect]:
        # The view is fixed here for the whole round: both ends of a link reckon with the
        # degrees that were announced, whatever happens to a third peer meanwhile.
        sends_to, hears_from = self._views(self.round)
        self._view = View(
            tuple(p for p in sends_to if p not in self._gone),
            tuple(p for p in hears_from if p not in self._gone or self._mail.get(p)),
        )
        self._agreement.measured("train_loss", self._loss)
        degree, message = len(self._view.sends_to), self.algorithm.send(self.state)
        self._remember(self.me, degree, message)
        score = self._agreement.begin(self.round)
        effects: list[Effect] = [Send(self._view.sends_to, self.round, degree, score, message)]
        if 0 < self.pace.patience < math.inf:
            effects.append(SetTimer(self.pace.patience, self.round))
        return effects

    def _received(self, event: Received) -> list[Effect]:
        sender = event.sender
        if sender not in self._views(event.round).hears_from:
            raise RemoteProtocolError(f"{sender} is not a neighbour in round {event.round}")
        if event.round <= self._newest.get(sender, -1):
            raise RemoteProtocolError(f"{sender} sent round {event.round} again, or out of order")
        if self.algorithm.absorb is not newest:
            self._try_absorb(event)
        self._newest[sender] = event.round
        mail = self._mail.setdefault(sender, deque())
        mail.append(event)
        if len(mail) > self.pace.backlog and self._replaceable and self.pace.patience < math.inf:
            mail.popleft()
            self._outran.add(sender)
        if event.round <= self.round:
            self._outran.discard(sender)
        # A model of the last round, come while we train for the next, is as good as in time:
        # whose wait for a third peer made us wait in vain is in step again.
        if event.round + (self.phase is Phase.TRAINING) >= self.round:
            self._late.discard(sender)
        return self._try_close()

    def _try_absorb(self, event: Received) -> None:
        """Refuse a message that cannot be decoded now, while nothing has changed yet."""
        try:
            self.algorithm.absorb(None, cast(M, event.message), self._width)
        except ValueError as error:
            raise RemoteProtocolError(f"message of {event.sender}: {error}") from error

    @property
    def _replaceable(self) -> bool:
        """Whether a newer message of a sender makes the older ones worthless."""
        return self.algorithm.absorb is newest and self.mixing.conserves == "mean"

    def _try_close(self) -> list[Effect]:
        if self.phase is not Phase.WAITING:
            return []
        missing = []
        for peer in self._view.hears_from:
            mail = self._mail.get(peer)
            if (mail and mail[-1].round >= self.round) or peer in self._outran:
                continue
            if self._patient and peer not in self._gone and peer not in self._late:
                return []
            missing.append(peer)
        return self._close(tuple(missing) if self.pace.patience else ())

    def _close(self, missing: tuple[PeerId, ...]) -> list[Effect]:
        self._late.update(missing)
        inbox, received = self._open_mail()
        if self.algorithm.absorb is newest:
            self._heard.clear()  # what was said before says nothing of later rounds
        self.state = self.algorithm.receive(self.state, inbox)
        together = self._agreement.reached(self.round)
        last = together or self._out_of_time or self.round + 1 >= self.pace.rounds
        missed = tuple(p for p in missing if p not in self._gone)
        effects: list[Effect] = [Report(self.round, self._loss, self.params, received, missed)]
        every = self.pace.evaluate_every
        if every and (last or (self.round + 1) % every == 0):
            effects.append(Evaluate(self.round, self.params))
        self.round += 1
        if last:
            self.phase = Phase.DONE
            return [*effects, Stop(self._reason(together))]
        return effects + self._train()

    def _reason(self, together: bool) -> str:
        if together:
            return "converged"
        return "all rounds done" if self.round >= self.pace.rounds else "out of time"

    def _open_mail(self) -> tuple[Inbox[R], int]:
        """Return what there is to mix, and how many bytes of mail were opened for it."""
        entries: list[tuple[PeerId, float, R]] = []
        # Where neighbours change, a letter may come when its sender is none any more. It is
        # taken now: later it would be old, and a share of a mass may not be lost.
        others = tuple(p for p in self._mail if self._mail[p] and p not in self._view.hears_from)
        mail = {peer: self._due(peer) for peer in (*self._view.hears_from, *others)}
        mail = {p: letters for p, letters in mail.items() if letters or p not in others}
        received, taking = 0, len(mail)
        shares = self.mixing.conserves == "mass"  # every message is one, to be taken once
        for peer, letters in mail.items():
            received += sum(letter.size for letter in letters)
            if peer not in others:
                self._take_scores(peer, letters)
            for letter in letters:
                degree, memory = self._remember(peer, letter.degree, letter.message)
                if shares:
                    entries.append((peer, self.mixing.weight(taking, degree), memory))
            if not shares and peer in self._heard:
                degree, memory = self._heard[peer]
                entries.append((peer, self.mixing.weight(taking, degree), memory))
        return self._inbox(entries), received

    def _take_scores(self, peer: PeerId, letters: list[Received]) -> None:
        scores = [letter.score for letter in letters if letter.round == self.round]
        for score in scores:
            self._agreement.heard(score)
        if not scores and peer not in self._gone:
            self._agreement.missed()

    def _due(self, peer: PeerId) -> list[Received]:
        mail, letters = self._mail.get(peer, deque()), []
        everything = not self.pace.patience or peer in self._outran
        while mail and (everything or mail[0].round <= self.round):
            letters.append(mail.popleft())
        return letters

    def _inbox(self, entries: list[tuple[PeerId, float, R]]) -> Inbox[R]:
        giving, mine = self._heard[self.me]
        if self.mixing.conserves == "mean":  # what was not heard goes back to oneself
            kept = 1 - math.fsum(weight for _, weight, _ in entries)
        else:
            kept = 1 - giving * self.mixing.weight(len(self._view.hears_from), giving)
        # All peers add up in the order of the ids, so that peers which hear the same hold
        # the same, to the bit.
        entries = sorted([*entries, (self.me, kept, mine)], key=lambda entry: entry[0])
        senders, weights, memories = zip(*entries, strict=True)
        return unstacked(weights, memories, senders.index(self.me))

    def _remember(self, peer: PeerId, degree: int, message: tuple[Tensor, ...]) -> tuple[int, R]:
        known = self._heard[peer][1] if peer in self._heard else None
        memory = self.algorithm.absorb(known, cast(M, message), self._width)
        self._heard[peer] = (degree, memory)
        return degree, memory
