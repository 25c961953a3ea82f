"""A peer in rounds, as a state machine: no clock, no sockets, no threads.

A round of a peer is

    TRAINING --Trained--> WAITING --all heard, or out of patience--> TRAINING ...

and the machine moves only inside `Peer.handle`. `patience` is how long it waits for its
neighbours after sending: for ever makes rounds synchronous, zero makes the peer
asynchronous (it takes what has come), anything between is a deadline. A neighbour that
misses a deadline is not waited for again until it has caught up, so whoever dies or
freezes costs the others one deadline in all. A neighbour that has run far ahead is not
waited for either: its newest model is taken for what it is.

Where messages are lost, a peer that lost none goes on while its neighbours wait out a deadline,
and meets its next one just before they speak: it would take them for late, and run away. So a
peer that hears a neighbour two to eight rounds ahead, which has done without it, waits for nobody
until it has caught up; and one whose neighbours are all late waits for those that fall no further
behind.

Where the topology follows who is alive, two neighbours may not agree on who that is, nor on
who was in time. An exchange of which only one end makes use would move the mean of all. So
there a model counts in its own round or never; a peer that does without a neighbour in a
round says so (`Skip`), and neither counts the other. What is left are models that were mixed
before such a word came: they are counted.

There, too, if links go both ways, a peer that finds, when it is about to speak, that most others
have gone on without it speaks in the round they come to next.

With `overlap` the local steps of the next round are taken while it waits, from the model
that was sent, and what they have changed is carried over to what came of the exchange. A
round still ends when all are heard; TRAINING is then what is left of those steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from typing import Generic

from torch import Tensor

from p2pfl.algorithm import Algorithm, M, R, Rows, S
from p2pfl.errors import LocalProtocolError, RemoteProtocolError, diverged
from p2pfl.peer.addressed import variant
from p2pfl.peer.company import REMEMBERED, Company
from p2pfl.peer.events import (
    Discard,
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
    Skip,
    Skipped,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.peer.mail import Mail, Opened, is_replaceable
from p2pfl.peer.plan import BACKLOG, Pace, View, Views, is_measured
from p2pfl.peer.stopping import Agreement
from p2pfl.topology.mixing import Mixing

FEW = 3  # peers: where neighbours change, so many of them are asked how far they are
MEET = 8  # every so many rounds whoever is furthest is followed
TIME_IS_UP = -1  # the number of the timer that runs once, in place of a round's


class Phase(Enum):
    """What a peer is doing."""

    IDLE = "idle"
    TRAINING = "training"
    WAITING = "waiting"
    DONE = "done"


class Peer(Generic[S, M, R]):
    """One node of the system: a block with a single row and its mail.

    Args:
        algorithm: what it does.
        mixing: what it takes of the others.
        views: whom it talks to.
        pace: how long it goes on.
        params: the initial model, ``[1, d]``.
        rows: who it is.
        begin: where it goes on, if it does not begin.
    """

    def __init__(  # noqa: PLR0913 - all that makes a peer
        self,
        algorithm: Algorithm[S, M, R],
        mixing: Mixing,
        views: Views,
        pace: Pace,
        params: Tensor,
        rows: Rows,
        begin: Position | None = None,
    ) -> None:
        self.me: PeerId = int(rows.nodes[0])
        self.algorithm, self.pace = algorithm, pace
        begin = begin or Position(0, 0, algorithm.init(params, rows))
        self.phase = Phase.IDLE
        self.round, self.step, self.state = begin
        # Whether both ends of a link are to count each other, or neither.
        averages = is_replaceable(algorithm) and mixing.conserves == "mean"
        self._mutual = views.mutual and averages and pace.patience > 0
        self._has_deadlines = 0 < pace.patience < math.inf
        self.mail = Mail(self.me, algorithm, mixing, params.shape[1], pace, self._mutual)
        self._view_of = lru_cache(maxsize=4)(views.of)
        # Whether who is behind catches up by leaving out rounds.
        self._leaps = views.mutual and pace.patience > 0
        gap = math.inf if pace.patience == math.inf else BACKLOG
        self._follows, self._company = views.follow, Company(self._leaps, gap)
        self._view = View((), ())
        # In which of the last rounds we have spoken, and who knows of it.
        self._told: deque[tuple[int, tuple[PeerId, ...]]] = deque(
            maxlen=1 if self._mutual else REMEMBERED
        )
        self._hearing: set[PeerId] = set()  # who has heard all that was said
        self._one_sided = self._steps = 0
        self._patient, self._out_of_time = True, False
        self._training = False  # whether a `Train` is unanswered
        self._trained: Trained | None = None  # an answer that is not made use of yet
        self._sent: S | None = None  # what it started from, if the exchange goes on meanwhile
        self._unjudged = False  # whether the next score asks for an `Evaluated` first
        self._loss = math.nan
        self._agreement = Agreement(pace.stop, pace.width, floods=pace.floods)

    @property
    def params(self) -> Tensor:
        """The current model, ``[1, d]``."""
        return self.algorithm.model(self.state)

    @property
    def awaited(self) -> list[PeerId]:
        """Those without a word of whom this round does not end, while there is time."""
        if self.phase is not Phase.WAITING or not self._patient:
            return []
        return [peer for peer in self._silent() if self._is_waited_for(peer)]

    @property
    def position(self) -> Position:
        """Where it stands, when a `Report` has just been asked for."""
        return Position(self.round, self.step, self.state)

    def handle(self, event: Event) -> list[Effect]:
        """Take in one event and return the effects it calls for; see `Machine`."""
        match event:
            case Received():  # far more often than all else
                return self._receive(event)
            case Trained():
                return self._take_trained(event)
            case Started():
                limit = [SetTimer(self.pace.seconds, TIME_IS_UP)]
                self.phase = Phase.TRAINING
                return [*(limit if self.pace.seconds < math.inf else []), *self._train(self.round)]
            case Evaluated():
                self._agreement.measured("eval_loss", event.loss)
                self._agreement.measured("eval_acc", event.acc)
                self._unjudged = False
                return self._try_speak()
            case Skipped():
                return self._skipped(event)
            case TimerFired(round=number):
                self._out_of_time |= number == TIME_IS_UP
                self._patient &= number != self.round
                return self._try_close()
            case PeerUp() | PeerSuspected() | PeerDown():
                return self._note(event)

    def _note(self, event: PeerUp | PeerSuspected | PeerDown) -> list[Effect]:
        """Take note of who is there."""
        company, peer = self._company, event.peer
        before = company.gone
        if isinstance(event, PeerUp) and event.anew:
            self.mail.forget(peer)
        if isinstance(event, PeerDown):
            self._hearing.discard(peer)
            if not event.done:
                self.mail.take_back(peer)
        company.note(event, self.round)
        effects: list[Effect] = []
        if company.gone != before and self._follows and self.pace.patience:
            effects += self._pass_by()
        return [*effects, *self._try_close()]

    def _pass_by(self) -> list[Effect]:
        """Tell those who are to hear us only now that we have spoken already, and wait in vain.

        Where both ends of a link count, who is behind speaks to us, and is told then.
        """
        effects: list[Effect] = []
        if self._mutual and self.phase is not Phase.WAITING:
            return effects
        for i, (round, told) in enumerate(self._told):
            there = (p for p in self._view_in(round).sends_to if p not in self._company.gone)
            if new := tuple(p for p in there if p not in told):
                self._told[i] = round, told + new
                effects.append(Skip(new, round))
        return effects

    def _train(self, round: int) -> list[Effect]:
        self._training, self._steps = True, self.pace.steps_in(round)
        return [Train(self.step, self._steps, self.state)]

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
        if self._steps and not math.isfinite(done.loss):
            raise diverged(self.me, f"in round {self.round}", done.loss)
        self.state, self._loss = self._carried(done.state), done.loss
        self.step += self._steps
        if self._steps:
            self._agreement.measured("train_loss", self._loss)
        self._trained = self._sent = None
        self._catch_up()
        self.phase, self._patient = Phase.WAITING, self.pace.patience > 0
        effects = self._speak()
        if self.pace.overlap and not self._is_last:
            self._sent = self.state
            effects += self._train(self.round + 1)
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
        gone = self._company.gone
        view = self._view = self._view_in(self.round)
        if gone:
            self._view = view._replace(
                sends_to=tuple(p for p in view.sends_to if p not in gone),
                hears_from=tuple(
                    p for p in view.hears_from if p not in gone or self._has_last_words(p)
                ),
            )
        self._told.append((self.round, self._view.sends_to))
        fresh, degree = self._begin_anew(), len(self._view.sends_to)
        message = self.algorithm.send(self.state)
        own = variant(message, 0) if self.algorithm.needs.addressed else message
        self.mail.remember(self.me, degree, own, fresh)
        score, places = self._agreement.begin(self.round), view.sends_to
        doubted = {peer for peer in self._view.sends_to if not self._company.is_there(peer)}
        effects: list[Effect] = [
            Send(to, self.round, degree, score, said, fresh)
            for to, said in self.mail.said(self._view, self.round, places, message, doubted)
        ]
        effects += self._turned_away()
        if self._has_deadlines:
            effects.append(SetTimer(self.pace.patience, self.round))
        return effects

    def _view_in(self, round: int) -> View:
        """Return whom we talk to in a round, as far as we know who is there now."""
        return self._view_of(round, self._company.absent(round))

    def _catch_up(self) -> None:
        """Go to the round that most others come to next, if they have gone on without us.

        Now and then one of them is enough: two halves that have lost each other for a while
        would else go on side by side, a few rounds apart.
        """
        if not self._leaps:
            return
        near = self._view_in(self.round).hears_from
        # Where neighbours change others may well be ahead; but not those who had to wait for us.
        beyond = any(self.mail.newest(peer) > self.round for peer in near)
        if not beyond and not self._company.has_been_left_out(self.round - BACKLOG):
            return
        theirs = self.mail.latest_rounds(max(FEW, len(near)))
        share = 1 if self.round % MEET == 0 else 2
        reached = theirs[(len(theirs) - 1) // share] if theirs else -1
        if share == 1 or len(theirs) == 1:  # a single voice may lie
            reached = min(reached, self.round + BACKLOG)
        if reached > self.round:
            self.round = min(reached + 1, self.pace.rounds - 1)
            self._agreement.missed()  # what was said in between

    def _has_last_words(self, peer: PeerId) -> bool:
        """Say whether there is something of a peer that is gone, and to be counted by us alone."""
        return bool(self.mail.unopened.get(peer)) and not self._mutual

    def _begin_anew(self) -> bool:
        """Take back what was said, if somebody is to hear us now who has not heard it."""
        hearing = set(self._view.sends_to)
        new, self._hearing = hearing - self._hearing, hearing
        if self.algorithm.restart is None or not new:
            return False
        self.state = self.algorithm.restart(self.state)
        return True

    def _turned_away(self) -> list[Effect]:
        """Drop what has come of rounds we have left out, and of those who are no neighbours."""
        effects: list[Effect] = []
        for peer in sorted(self.mail.unopened) if self._mutual else ():
            if self._company.lags(peer) and peer in self._view.hears_from:
                continue
            strange = peer not in self._view.hears_from
            for letter in self.mail.drop(peer, range(self.round + strange)):
                effects += [Skip((peer,), letter.round), Discard(letter.message)]
        return effects

    def _receive(self, event: Received) -> list[Effect]:
        sender, spoken, company = event.sender, self.phase is Phase.WAITING, self._company
        known = self._is_neighbour(event)
        if not known and not self._follows:
            raise RemoteProtocolError(f"{sender} is not a neighbour in round {event.round}")
        if event.round >= self.pace.rounds:
            raise RemoteProtocolError(f"{sender} speaks in a round that there will not be")
        before = self.mail.newest(sender)
        self.mail.put(event, self.round)
        if self.pace.patience:  # else nobody is waited for
            self._note_pace(event, before)
        effects: list[Effect] = []
        if self._mutual and company.is_left_out(sender, event.round):
            effects = self._drop(sender, event.round)
        elif self._mutual and event.round < self.round + (spoken and not known):
            # It comes too late, or from a stranger; who is one in a later round may not be then.
            # Of who is always late its model is better than none, as it is.
            now = self._view_in(self.round).hears_from
            kept = sender in now and company.lags(sender)
            effects = [Skip((sender,), event.round, kept)]
            effects += [] if kept else self._drop(sender, event.round)
        return [*effects, *self._try_close()]

    def _note_pace(self, event: Received, before: int) -> None:
        """Take note of whether a sender, whom we heard last in the round `before`, is in time."""
        sender, round, company = event.sender, self.round, self._company
        # A model of the last round, come while we train for the next, is as good as in time:
        # whose wait for a third peer made us wait in vain is in step again.
        if event.round + (self.phase is not Phase.WAITING) >= round:
            company.in_time(sender, event.round, before)
            return
        alone = self._has_deadlines and not any(
            company.is_waited_for(p, round) for p in self._view.hears_from
        )
        company.behind(sender, event.round, round - event.round, alone)

    def _drop(self, sender: PeerId, round: int) -> list[Effect]:
        letters = self.mail.drop(sender, range(round, round + 1))
        return [Discard(letter.message) for letter in letters]

    def _is_neighbour(self, event: Received) -> bool:
        """Say whether we hear the sender of a message in its round."""
        if self.phase is Phase.WAITING and event.round == self.round:
            return event.sender in self._view.hears_from
        return event.sender in self._view_in(event.round).hears_from

    def _skipped(self, event: Skipped) -> list[Effect]:
        sender, round = event.sender, event.round
        if round < self.round:  # too late: we have counted it, if it had come
            self._one_sided += self.mail.disown(sender, round)
            return []
        if event.kept:
            self._company.count_alone(sender, round)
            return []
        self._company.leave_out(sender, round)
        return [*self._drop(sender, round), *self._try_close()]

    def _try_close(self) -> list[Effect]:
        if self.phase is not Phase.WAITING:
            return []
        company = self._company
        hurries = self._has_deadlines and any(map(self._has_left_us, self._view.hears_from))
        patient, missing = self._patient and not hurries, []
        for peer in self._silent():
            if patient and self._is_waited_for(peer):
                return []
            missing.append(peer)
        # Whose neighbours have all just come back would run away from them, waiting for nobody. But
        # who is behind others goes on, to catch up with them: they may wait like this for us.
        alone = self._mutual and self._patient and len(missing) == len(self._view.hears_from)
        if alone and self.mail.furthest <= self.round and any(map(company.has_returned, missing)):
            return []
        if hurries or not self.pace.patience:  # they were given no time
            missing = []
        company.missed(missing, self.round)
        return self._close(tuple(missing))

    def _silent(self) -> Iterator[PeerId]:
        """Return of whom nothing of this round has come, nor of a later one."""
        return (p for p in self._view.hears_from if not self.mail.has_come(p, self.round))

    def _has_left_us(self, peer: PeerId) -> bool:
        """Say whether a neighbour has ended a round that we have not come to, so without us.

        One that is far ahead is faster, and not to be caught up with.
        """
        ended = self.mail.newest(peer) - 1
        is_near = self.round < ended < self.round + BACKLOG and self._company.is_there(peer)
        return is_near and peer in self._view_in(ended).sends_to

    def _is_waited_for(self, peer: PeerId) -> bool:
        """Say whether somebody whom we heard in this round is still to speak, as far as we know.

        Who is no neighbour of ours any more may have seen so before it spoke. Where both ends of a
        link count, it says so itself; and of the last round all are leaving.
        """
        if not self._company.is_waited_for(peer, self.round):
            return False
        return self._mutual or peer in self._view_in(self.round).hears_from

    def _close(self, missing: tuple[PeerId, ...]) -> list[Effect]:
        opened = self.mail.open(self._view, self.round, not self.pace.patience)
        effects = self._leave_out(opened)
        self.state = self.algorithm.receive(self.state, opened.inbox)
        self._take_scores(opened.scores)
        together = self._agreement.reached(self.round)
        last = together or self._is_last
        missed = tuple(p for p in missing if p not in self._company.gone)
        one_sided = self._one_sided + (opened.stale if self._mutual else 0)
        self._one_sided = 0
        report = (self.round, self._loss, self.params, opened.received, missed, one_sided)
        effects.append(Report(*report))
        if is_measured(self.pace.evaluate_every, self.round, last):
            stop = self.pace.stop
            effects.append(Evaluate(self.round, self.params))
            self._unjudged = stop is not None and stop.metric != "train_loss"
        self.round += 1
        if last:
            self.phase = Phase.DONE
            return [*effects, Stop(self._reason(together))]
        self.phase = Phase.TRAINING
        return [*effects, *(self._try_speak() if self.pace.overlap else self._train(self.round))]

    def _leave_out(self, opened: Opened[R]) -> list[Effect]:
        """Tell those of whom nothing came that we do without them, unless they said so first.

        Who is always late may count us all the same: we take what it says when it comes.
        """
        company, now = self._company, self.round
        alone = [p for p, said in opened.scores.items() if said and company.counts_alone(p, now)]
        self._one_sided += len(alone)
        effects: list[Effect] = []
        for kept in (False, True) if self._mutual else ():
            silent = tuple(
                peer
                for peer, said in opened.scores.items()
                if not said and company.lags(peer) == kept and not company.is_left_out(peer, now)
            )
            effects += [Skip(silent, now, kept)] if silent else []
        return effects

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
            if not said and peer not in self._company.gone:
                self._agreement.missed()
