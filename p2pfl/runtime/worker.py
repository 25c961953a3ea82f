"""The thread of a peer that computes: what was heard is mixed, steps are taken, models measured."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import nan
from typing import Any, NamedTuple, TypeAlias

import torch
import zmq
from torch import Tensor

from p2pfl.algorithm import Algorithm
from p2pfl.learning.evaluation import Scores
from p2pfl.learning.task import Task
from p2pfl.learning.training import train
from p2pfl.learning.tree import wide
from p2pfl.peer.events import Evaluate, Evaluated, PeerId, Position, Report, Train, Trained
from p2pfl.runtime.conserved import Drift
from p2pfl.runtime.later import Later, later
from p2pfl.runtime.links import Links
from p2pfl.runtime.sketch import sketch


class Marked(NamedTuple):
    """The sketch of the model that a round ended with, and of what exchanges changed till then."""

    round: int
    mark: Tensor  # [2, WIDTH]


class Give(NamedTuple):
    """A model that was asked for, in which round."""

    to: PeerId
    round: int
    params: Tensor  # a `Later` in truth


class Given(NamedTuple):
    """The same, worked out."""

    to: PeerId
    round: int
    model: Tensor  # [1, d]


class Kept(NamedTuple):
    """What is to be said of a checkpoint."""

    kind: str  # of the event
    fields: dict[str, Any]


Order: TypeAlias = Train | Evaluate | Report | Give | Position
Result: TypeAlias = Trained | Evaluated | Marked | Given | Kept | None
Keep = Callable[[Position], tuple[str, dict[str, Any]] | None]


class Worker:
    """Does one thing after the other, and wakes the poller of the links when it is done.

    Args:
        algorithm: of the states, which are `Later` ones.
        task: what is learned.
        node: as which node.
        links: whose poller is woken.
        name: of the way to it.
        keep: writes checkpoints, if they are due.
        drift: watches the exchanges of the algorithm; None: nobody does.
    """

    def __init__(  # noqa: PLR0913 - all that it works with
        self,
        algorithm: Algorithm[Any, Any, Any],
        task: Task,
        node: int,
        links: Links,
        name: str,
        keep: Keep = lambda position: None,
        drift: Drift | None = None,
    ) -> None:
        self._keep, self._drift = keep, drift
        self._algorithm, self._task = algorithm, _Haltable(task)
        self._nodes = torch.tensor([node])
        self._links, self._name = links, name
        self._wake = links.inproc(name)
        self._thread = ThreadPoolExecutor(1, initializer=self._open)
        self._results: list[Future[Result]] = []

    @property
    def is_busy(self) -> bool:
        """Whether something is still to be done, or was done and not fetched."""
        return bool(self._results)

    def do(self, effect: Order) -> None:
        """Put something on the list."""
        self._results.append(self._thread.submit(self._work, effect))
        self._thread.submit(self.wake)  # not before the result is there

    def done(self) -> Iterator[Result]:
        """Yield what has been done, in order."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._wake.recv(zmq.NOBLOCK)
        while self._results and self._results[0].done():
            yield self._results.pop(0).result()

    def wake(self) -> None:
        """Wake the poller: only ever called by the thread itself."""
        with contextlib.suppress(zmq.Again):  # it has been woken often enough
            if not self._waker.closed:
                self._waker.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        """Break off what is under way, and end the thread."""
        self._task.halt()
        self._links.end_streams()
        self._thread.submit(self._close)
        self._thread.shutdown()
        self._links.poller.unregister(self._wake)
        self._wake.close(0)

    def _open(self) -> None:
        self._waker = self._links.waker(self._name)

    def _close(self) -> None:
        self._waker.close(0)

    def _work(self, effect: Order) -> Result:
        if isinstance(effect, Position):
            said = self._keep(effect._replace(state=effect.state.now()))
            return Kept(*said) if said else None
        if isinstance(effect, Give):
            return Given(effect.to, effect.round, later(effect.params).params)
        if isinstance(effect, Report):
            # To ask for the model works out the exchange, if that has to be.
            mark = sketch(later(effect.params).params)
            moved = self._drift.take().to(mark) if self._drift else torch.full_like(mark[0], nan)
            return Marked(effect.round, torch.stack([mark[0], moved]))
        if isinstance(effect, Evaluate):
            loss, acc = self._task.evaluate(later(effect.params).params, self._nodes)
            return Evaluated(effect.round, loss.item(), acc.item())
        first, count = torch.tensor([effect.step]), torch.tensor([effect.count])
        algorithm, state = self._algorithm, effect.state.now()
        state, mean = train(algorithm, self._task, state, self._nodes, first, count)
        return Trained(effect.step, Later(algorithm, state), mean.item())


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
