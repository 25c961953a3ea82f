"""Runtime one: all nodes in one block, synchronous rounds, no network."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import newest
from p2pfl.errors import UserError, diverged
from p2pfl.learning.evaluation import Scores
from p2pfl.learning.scratch import keep_freed_memory
from p2pfl.learning.training import train_
from p2pfl.learning.tree import assign, leaves, tree_map, unshared, views, wide
from p2pfl.peer.addressed import side_by_side, spread
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.plan import is_measured
from p2pfl.peer.stopping import Agreement, Progress
from p2pfl.runtime.exchange import block_width, receive_, squared_distances
from p2pfl.runtime.ranks import Neighbourhood, Ranks
from p2pfl.runtime.setup import Ending, Row, Seconds, Setup
from p2pfl.runtime.traffic import Traffic


class Snapshot(NamedTuple):
    """All that the rounds to come follow from, at the end of a round.

    Trees of tensors, numbers and None; those of runs of one experiment have the same outline.
    """

    rounds: int  # that have been done
    updates: int
    wall_s: float
    seconds: tuple[float, ...]  # as of `Seconds`
    state: Any
    heard: Any  # what is remembered of the senders, where that is more than their last message
    sent: Any  # with overlap, what training goes on from
    progress: Progress | None  # towards stopping
    lowest: float


class Simulator:
    """Train all nodes together; `rounds` yields after every round, `ending` is the result.

    The state is trained and mixed where it lies: a run needs the memory of one state, of a
    few blocks of rows and columns, and of the data. Where peers would train while they exchange
    (`Pace.overlap`), it does one after the other with the same result, and holds three states.

    Args:
        setup: the run.
        ranks: who holds which nodes, if they are shared out among processes.

    Attributes:
        seconds: where the time has gone so far.
        scores: how good the mean model was when it was measured last, or None.
        done: how many rounds have been done.
        over: whether the last has.
    """

    def __init__(self, setup: Setup, ranks: Ranks | None = None) -> None:
        if isinstance(setup.pace, Tempo):
            raise _needs_a_clock("pace.name = 'timer'")
        if setup.pace.seconds < math.inf:
            raise _needs_a_clock("pace.seconds")
        if setup.churn:
            raise _needs_a_clock("churn")
        self._addressed = setup.algorithm.needs.addressed
        if self._addressed and ranks and ranks.size > 1:
            raise UserError("ranks of torchrun cannot send every neighbour something else")
        keep_freed_memory()
        self.setup, self.pace, self.ranks = setup, setup.pace, ranks or Ranks()
        self.nodes = self.ranks.nodes(setup.topology.n)
        rows = setup.rows(self.nodes)
        self.examples = self.ranks.gather(rows.examples).tolist()
        self.state: Any = unshared(setup.algorithm.init(setup.task.init(self.nodes), rows))
        self._device = next(leaves(self.state)).device
        self.reason, self.updates, self.over = "all rounds done", 0, False
        self.done = 0
        self._wide = next(wide(leaf) for leaf in leaves(self.state) if leaf.is_floating_point())
        self.seconds = Seconds()
        self.scores: Scores | None = None
        self._traffic = Traffic(setup, int(self.nodes[0]))
        self._clock = time.perf_counter()
        told = self.pace.stop, self.pace.width, setup.topology.n, self.pace.floods
        self._agreement = Agreement(*told)
        self._around: tuple[Tensor, Neighbourhood] | None = None
        self._heard: Any = None  # what is remembered of the senders
        self._sent: Any = None  # the last state that was sent, where training goes on from it

    @property
    def params(self) -> Tensor:
        """The current models of the nodes held here, ``[rows, d]``."""
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
        steps = self.setup.steps(self.nodes)
        each, every = int(self.ranks.total(steps.sum())), self.pace.train_every
        for k in range(self.done, self.pace.rounds):
            trains = k % every == 0
            loss = self._train(k, -(-k // every) * steps, steps if trains else 0 * steps)
            if trains:
                self.updates += each
                self._agreement.measured("train_loss", loss)
            self._agreement.begin(k)
            if self.pace.overlap and k + 1 < self.pace.rounds:
                self._sent = tree_map(torch.clone, self.state)
            self._exchange(k)
            together = self._agreement.reached(k)
            self.done, self.over = k + 1, together or k + 1 == self.pace.rounds
            yield self._rows(k, loss, self.over)
            if together:
                self.reason = "converged"
                return

    def snapshot(self) -> Snapshot:
        """Return all that the rounds to come follow from; the tensors are not copied."""
        return Snapshot(
            self.done,
            self.updates,
            time.perf_counter() - self._clock,
            astuple(self.seconds),
            self.state,
            self._heard,
            self._sent,
            self._agreement.progress,
            self._agreement.lowest,
        )

    def vacate(self) -> Snapshot:
        """Give up the state; return what any snapshot of this run looks like.

        Its tensors have shapes and types but no values (they are on the meta device). Whoever
        reads a snapshot in has the memory of the state for it, and hands it to `restore`.
        """
        algorithm, setup = self.setup.algorithm, self.setup
        outline = tree_map(lambda leaf: leaf.to("meta"), self.state)
        heard: Any = None
        if algorithm.absorb is not newest:
            message = setup.message(int(self.nodes[0]))
            of_one = algorithm.absorb(None, message, setup.task.d)
            rows = len(self.nodes)
            if self._addressed:
                rows *= self._variants(algorithm.send(self.state))
            heard = tree_map(lambda f: f.new_empty((rows, *f.shape[1:]), device="meta"), of_one)
        self.state = None
        sent = outline if self.pace.overlap else None
        return self.snapshot()._replace(state=outline, heard=heard, sent=sent)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the same run, whose tensors are overwritten from now on.

        Raises:
            UserError: so many rounds have been done already.
        """
        if snapshot.rounds >= self.pace.rounds:
            raise UserError(
                f"pace.rounds = {self.pace.rounds}, but {snapshot.rounds} rounds have been done:"
                " set it to more"
            )
        self.done, self.updates = snapshot.rounds, snapshot.updates
        self._clock = time.perf_counter() - snapshot.wall_s
        self.seconds = Seconds(*snapshot.seconds)
        self.state, self._heard, self._sent = (
            None if tree is None else tree_map(lambda leaf: leaf.to(self._device), tree)
            for tree in (snapshot.state, snapshot.heard, snapshot.sent)
        )
        self._agreement.progress = snapshot.progress
        self._agreement.lowest = snapshot.lowest

    @property
    def exchange_path(self) -> str:
        """How the state is mixed, in words, once it has been."""
        weights = self.setup.weights(0)
        kind = "sparse" if weights.layout is torch.sparse_csr else "dense"
        if len(weights) > 1 and kind == "dense" and weights.stride(0) == 0:
            kind = "equal"
        if not self.setup.algorithm.columnwise:
            return f"{kind} weights, whole models"
        d = self.setup.task.d
        return f"{kind} weights, in place, {min(d, self._columns)} of {d} columns at a time"

    def _train(self, k: int, first: Tensor, steps: Tensor) -> Tensor:
        """Make so many local steps of each row in round k; return everybody's loss, ``[n]``."""
        began = time.perf_counter()
        setup = self.setup
        if self._sent is None:
            mine = train_(setup.algorithm, setup.task, self.state, self.nodes, first, steps)
        else:
            mine = self._train_from_sent(first, steps)
        loss, made = self.ranks.gather(mine), self.ranks.gather(steps)
        bad = (~loss.isfinite().cpu() & (made.cpu() > 0)).nonzero().flatten()
        if len(bad):
            raise diverged(int(bad[0]), f"in round {k}", float(loss[bad[0]]))
        self.seconds.training += time.perf_counter() - began
        return loss

    def _train_from_sent(self, first: Tensor, steps: Tensor) -> Tensor:
        """Make local steps from what was sent, and carry them over to what came of it."""
        algorithm, task, sent = self.setup.algorithm, self.setup.task, self._sent
        assert algorithm.carry is not None
        trained, self._sent = tree_map(torch.clone, sent), None
        loss = train_(algorithm, task, trained, self.nodes, first, steps)
        for start in range(0, len(self.nodes), task.block):
            rows = slice(start, start + task.block)
            mixed = views(self.state, rows)
            assign(mixed, algorithm.carry(views(sent, rows), views(trained, rows), mixed))
        return loss

    def _exchange(self, k: int) -> None:
        """Send, mix, and remember of the senders what the algorithm wants to."""
        began = time.perf_counter()
        algorithm = self.setup.algorithm
        message = algorithm.send(self.state)
        variants = self._variants(message)
        message = side_by_side(message) if self._addressed else message
        heard = algorithm.absorb(self._heard, message, self.setup.task.d)
        around = self._neighbourhood(k, variants)
        self._columns = block_width(heard, self.setup.task.d)
        self.state = receive_(algorithm, self.state, heard, around, self.setup.task.d)
        self._heard = None if algorithm.absorb is newest else heard
        self.seconds.exchange += time.perf_counter() - began

    def _variants(self, message: tuple[Tensor, ...]) -> int:
        """Return how many senders each node is: as many as there are variants of a message."""
        return message[0].shape[1] if self._addressed else 1

    def _neighbourhood(self, k: int, variants: int) -> Neighbourhood:
        weights = self.setup.weights(k)
        if self._around is None or self._around[0] is not weights:
            in_type = weights.to(self._wide)  # once, and not for every block
            if self._addressed:
                in_type = spread(in_type, self.setup.topology.links(k), variants)
            around = self.ranks.neighbourhood(in_type, self.setup.algorithm.columnwise)
            self._around = weights, around._replace(own=around.own * variants)
        return self._around[1]

    def _rows(self, k: int, loss: Tensor, last: bool) -> list[Row]:
        began = time.perf_counter()
        none = torch.full_like(loss, math.nan)
        scores, far = Scores(none, none), none
        if is_measured(self.pace.evaluate_every, k, last):
            scores, far = self._judge(none), self._compare()
            self._agreement.measured("eval_loss", scores[0])
            self._agreement.measured("eval_acc", scores[1])
        self.seconds.evaluation += time.perf_counter() - began
        sent, received = self._traffic.of_round(k)
        wall = time.perf_counter() - self._clock
        columns = (self.examples, *(c.tolist() for c in (loss, *scores, far, sent, received)))
        return [
            Row(k, node, a, b, c, held, distance, out, into, wall, math.nan)
            for node, (held, a, b, c, distance, out, into) in enumerate(zip(*columns, strict=True))
        ]

    def _judge(self, none: Tensor) -> Scores:
        """Return how good the nodes that are measured are, NaN for the others, ``[n]``."""
        task, judged = self.setup.task, self.setup.judged(self.nodes)
        found = task.evaluate(self.params[judged], self.nodes[judged])
        loss, acc = (self.ranks.gather(_spread(f.to(none), judged, self.nodes)) for f in found)
        return Scores(loss, acc)

    def _compare(self) -> Tensor:
        """Measure the mean model; return how far everybody is from it, squared, ``[n]``.

        Both are of the honest nodes; attackers are NaN.
        """
        params = self.params
        honest = self.setup.honest(self.nodes).to(params.device)
        counted = params if bool(honest.all()) else params[honest]
        total = counted.sum(0, dtype=self._wide)
        mean = self.ranks.total(total) / (self.setup.topology.n - len(self.setup.attackers))
        if self.setup.pooled is not None:
            self.scores = self.setup.pooled.evaluate(mean.unsqueeze(0), torch.tensor([0]))
        far = squared_distances(params, mean)
        return self.ranks.gather(far.masked_fill(~honest, math.nan))


def _spread(values: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
    spread = values.new_full((len(nodes),), math.nan)
    return spread.index_copy_(0, rows.to(values.device), values)


def _needs_a_clock(key: str) -> UserError:
    return UserError(
        f"{key} needs a clock, which the simulator has not: use --on emulate or --on local"
    )
