"""Runtime one: all nodes in one block, synchronous rounds, no network."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from p2pfl.algorithm import Inbox
from p2pfl.errors import UserError, diverged
from p2pfl.learning.training import train
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.stopping import Agreement
from p2pfl.runtime import wire
from p2pfl.runtime.setup import Ending, Row, Setup


class Simulator:
    """Train all nodes together; `rounds` yields after every round, `ending` is the result."""

    def __init__(self, setup: Setup) -> None:
        if isinstance(setup.pace, Tempo):
            raise _needs_a_clock("pace.name = 'timer'")
        if setup.pace.seconds < math.inf:
            raise _needs_a_clock("pace.seconds")
        self.setup, self.pace = setup, setup.pace
        self.nodes = torch.arange(setup.topology.n)
        rows = setup.rows(self.nodes)
        self.examples = rows.examples.tolist()
        self.state: Any = setup.algorithm.init(setup.task.init(self.nodes), rows)
        self.reason, self.updates = "all rounds done", 0
        self._clock = time.perf_counter()
        self._agreement = Agreement(self.pace.stop, self.pace.width, len(self.nodes))

    @property
    def params(self) -> Tensor:
        """The current models, ``[n, d]``."""
        return self.setup.algorithm.model(self.state)

    @property
    def ending(self) -> Ending:
        """How the run has come out so far."""
        return Ending(self.params, self.nodes, self.reason, self.updates)

    def rounds(self) -> Iterator[list[Row]]:
        """Run to the end, round by round.

        Raises:
            RunError: the training loss of a node is no longer finite.
        """
        algorithm, heard = self.setup.algorithm, None
        steps = self.setup.steps(self.nodes)
        for k in range(self.pace.rounds):
            self.state, loss = train(
                algorithm, self.setup.task, self.state, self.nodes, k * steps, steps
            )
            self._check(k, loss, steps)
            self.updates += int(steps.sum())
            self._agreement.measured("train_loss", loss)
            self._agreement.begin(k)
            message = algorithm.send(self.state)
            heard = algorithm.absorb(heard, message, self.params.shape[1])
            inbox = Inbox(self.setup.weights(k), heard, self.nodes)
            self.state = algorithm.receive(self.state, inbox)
            together = self._agreement.reached(k)
            last = together or k + 1 == self.pace.rounds
            yield self._rows(k, loss, message, last)
            if together:
                self.reason = "converged"
                return

    def _check(self, k: int, loss: Tensor, steps: Tensor) -> None:
        bad = self.nodes[~loss.isfinite().cpu() & (steps > 0)]
        if len(bad):
            raise diverged(int(bad[0]), f"in round {k}", float(loss[bad[0]]))

    def _rows(self, k: int, loss: Tensor, message: tuple[Tensor, ...], last: bool) -> list[Row]:
        params = self.params
        scores: tuple[Tensor, Tensor] = (torch.full_like(loss, math.nan),) * 2
        if last or (k + 1) % self.pace.evaluate_every == 0:
            scores = self.setup.task.evaluate(params, self.nodes)
            self._agreement.measured("eval_loss", scores[0])
            self._agreement.measured("eval_acc", scores[1])
        distance = (params - params.mean(0)).square().sum(1)
        sent, received = self._traffic(k, message)
        wall = time.perf_counter() - self._clock
        columns = (loss, *scores, distance, sent, received)
        table = zip(self.nodes.tolist(), *(column.tolist() for column in columns), strict=True)
        return [
            Row(k, node, a, b, c, self.examples[node], far, out, into, wall, math.nan)
            for node, a, b, c, far, out, into in table
        ]

    def _traffic(self, k: int, message: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the bytes each node sends and receives in round k, as peers would count them."""
        links = self.setup.topology.links(k)
        degree = torch.bincount(links.senders, minlength=links.n)
        payload = sum(block[:1].nbytes for block in message)
        size = torch.tensor(
            [payload + wire.header_size(i, k, d) for i, d in enumerate(degree.tolist())]
        )
        received = torch.zeros_like(size).index_add(0, links.receivers, size[links.senders])
        return degree * size, received


def _needs_a_clock(key: str) -> UserError:
    return UserError(
        f"{key} needs a clock, which the simulator has not: use --on emulate or --on local"
    )
