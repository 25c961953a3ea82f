"""The vocabulary of a peer: events it is told, effects it asks for.

Events are past participles and effects are imperatives. Neither is ever mutated, and
between them they are all that a runtime and a peer say to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

PeerId: TypeAlias = int


class Position(NamedTuple):
    """Where a peer stands between two rounds.

    Attributes:
        round: the next.
        step: the local steps in its model.
        state: of its algorithm.
    """

    round: int
    step: int
    state: Any


@dataclass(frozen=True, slots=True)
class Started:
    """The runtime is ready to carry out effects."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The local steps asked for with `Train` are done."""

    step: int  # the first of them, as in `Train`
    state: Any  # the algorithm's state after them
    loss: float  # mean over the steps; NaN when there were none


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The evaluation asked for with `Evaluate` is done."""

    round: int
    loss: float
    acc: float  # NaN where accuracy has no meaning


@dataclass(frozen=True, slots=True)
class Received:
    """A neighbour's message has arrived; the messages of one neighbour arrive in order."""

    sender: PeerId
    round: int
    degree: int  # how many peers it was sent to
    score: float  # the sender's share in the agreement on when to stop
    message: tuple[Tensor, ...]  # fields [1, ...]
    size: int = 0  # bytes on the wire
    fresh: bool = False  # whether it builds on nothing its sender has said before


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A timer set with `SetTimer` has run out."""

    round: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """A neighbour does without us in a round: it counts nothing of ours, so we nothing of its.

    Where links go one way, it has spoken to others in it, and says nothing to us.

    If it has `kept` what we said, which came too late, it takes that for what it is, later; so we
    may count it all the same.
    """

    sender: PeerId
    round: int
    kept: bool = False


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A peer has joined, or is there after all.

    If it is there `anew`, in another process than before, it knows nothing of us any more.
    """

    peer: PeerId
    anew: bool = False


@dataclass(frozen=True, slots=True)
class PeerSuspected:
    """A peer may be dead: it is waited for no longer, and nothing else changes yet."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """A peer has left or is presumed dead; what it sent before still counts.

    If it is `done`, it has come to the end of its rounds, as all will soon.
    """

    peer: PeerId
    done: bool = False


Event: TypeAlias = (
    Started
    | Trained
    | Evaluated
    | Received
    | Skipped
    | TimerFired
    | PeerUp
    | PeerSuspected
    | PeerDown
)


@dataclass(frozen=True, slots=True)
class Train:
    """Take `count` local steps from `state`, the first being `step`; answer with `Trained`.

    The answer depends on nothing but this, so a runtime may work it out when it likes.
    """

    step: int
    count: int
    state: Any


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver a message to each of the peers in `to`."""

    to: tuple[PeerId, ...]
    round: int
    degree: int
    score: float
    message: tuple[Tensor, ...]
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Skip:
    """Tell peers that a round has gone by without them; they are told `Skipped`."""

    to: tuple[PeerId, ...]
    round: int
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Discard:
    """A message that was received is of no use: what it takes up can be given free."""

    message: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Answer with `TimerFired` after this many seconds."""

    after: float
    round: int


@dataclass(frozen=True, slots=True)
class Report:
    """A round is over."""

    round: int
    loss: float  # mean training loss of its local steps
    params: Tensor  # [1, d]: the model it ended with
    received: int  # bytes
    missed: tuple[PeerId, ...] = ()  # neighbours that were waited for in vain
    one_sided: int = 0  # models mixed since the last report whose receivers did not mix ours


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure the model a round ended with; answer with `Evaluated`."""

    round: int
    params: Tensor  # [1, d]


@dataclass(frozen=True, slots=True)
class Stop:
    """There is nothing more to do."""

    reason: str


Effect: TypeAlias = Train | Send | Skip | Discard | SetTimer | Report | Evaluate | Stop


class Machine(Protocol):
    """What a runtime asks of a peer."""

    me: PeerId
    round: int  # which it is in, from 0
    step: int  # how many local steps are in its model

    @property
    def params(self) -> Tensor:
        """The current model, ``[1, d]``."""

    @property
    def position(self) -> Position:
        """Where it stands, when a `Report` has just been asked for: enough to go on from there."""

    def handle(self, event: Event) -> list[Effect]:
        """Take in one event and return the effects it calls for.

        Raises:
            RemoteProtocolError: another peer broke the rules; nothing has changed.
            LocalProtocolError: the runtime did; this peer cannot go on.
            RunError: training has diverged.
        """
