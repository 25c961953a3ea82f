"""What the three runtimes are given, and what they give back: one run, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Rows
from p2pfl.churn.script import Script
from p2pfl.learning.task import Task
from p2pfl.membership.timers import Timers
from p2pfl.peer.addressed import variant
from p2pfl.peer.events import Machine, Position
from p2pfl.peer.gossiper import Gossiper, Tempo
from p2pfl.peer.joining import Offer, position
from p2pfl.peer.ledger import Ledger
from p2pfl.peer.plan import BACKLOG, Pace, View, Views
from p2pfl.peer.rounds import Peer
from p2pfl.topology.mixing import Mixing, weighted
from p2pfl.topology.schedule import Topology

NOBODY = torch.empty(0, dtype=torch.int64)


class Row(NamedTuple):
    """One node in one round; the columns of ``metrics.csv``.

    `consensus_distance` is the squared distance of the node's model from the mean model,
    both at the end of the round; simulator and emulator measure it in the rounds that are
    evaluated. What was not measured is NaN.
    """

    round: int
    node: int
    train_loss: float
    eval_loss: float
    eval_acc: float
    num_examples: int
    consensus_distance: float
    bytes_sent: int
    bytes_received: int
    wall_s: float
    virtual_s: float


@dataclass
class Seconds:
    """Where the time of a run has gone."""

    training: float = 0.0
    exchange: float = 0.0
    evaluation: float = 0.0


class Mass(NamedTuple):
    """The weight of some peers where models are averaged by mass."""

    begun: float  # what they had at the outset
    held: float  # what they have


class Ending(NamedTuple):
    """How a run came out."""

    params: Tensor  # [rows, d]
    nodes: Tensor  # [rows]
    reason: str
    updates: int = 0  # local steps, of all rows
    virtual_s: float = math.nan
    missed: int = 0  # messages waited for in vain
    rejected: int = 0  # messages refused
    one_sided: int = 0  # models mixed without their senders having mixed ours
    mass: Mass | None = None  # of the rows, where models are averaged by mass


@dataclass(frozen=True)
class Setup:
    """Everything that makes a run what it is, whichever runtime drives it."""

    algorithm: Algorithm[Any, Any, Any]
    task: Task
    topology: Topology
    mixing: Mixing
    pace: Pace | Tempo
    steps: Callable[[Tensor], Tensor]  # local steps of each node in a round
    weights: Callable[[int], Tensor]  # round -> mixing matrix
    sample: Tensor | None = None  # the nodes which are measured, int64; None: all
    pooled: Task | None = None  # what the mean model is measured on, as its node 0
    among: Callable[[tuple[int, ...]], Topology] | None = None  # if it follows who is there
    churn: Script | None = None  # what happens to peers and links, besides
    membership: Timers | None = None  # how peers find out who is there; None: not by themselves
    attackers: Tensor = NOBODY  # int64, ascending: what is reported is about the others

    def rows(self, nodes: Tensor) -> Rows:
        """Say who the nodes are."""
        examples = self.task.examples(nodes)
        return Rows(nodes.to(examples.device), examples, self.neighbours(nodes))

    def neighbours(self, nodes: Tensor) -> Tensor | None:
        """Return the neighbours of some nodes, ``[rows, k]``, where an algorithm is told them."""
        needs = self.algorithm.needs
        if not (needs.addressed and needs.static):
            return None
        return self._neighbours[nodes.cpu()].to(nodes.device)

    def judged(self, nodes: Tensor) -> Tensor:
        """Return which of some nodes, ``[rows]``, are measured: their places, int64."""
        if self.sample is None:
            return torch.arange(len(nodes))
        return torch.isin(nodes.cpu(), self.sample).nonzero().flatten()

    def honest(self, nodes: Tensor) -> Tensor:
        """Say which of some nodes, ``[rows]``, are no attackers, bool ``[rows]``."""
        return ~torch.isin(nodes.cpu(), self.attackers)

    def message(self, node: int) -> tuple[Tensor, ...]:
        """Return what a node would say at the outset: all its messages have this form."""
        message: tuple[Tensor, ...] = self.algorithm.send(self.fresh(torch.tensor([node])))
        if self.algorithm.needs.addressed:
            return variant(message, 0)
        # Shares of a mass are summed up in single precision at least.
        return Ledger[Any]().give(node, message) if self.mixing.conserves == "mass" else message

    def fresh(self, nodes: Tensor) -> Any:  # noqa: ANN401 - whatever the algorithm keeps
        """Return the state that some nodes begin from."""
        return self.algorithm.init(self.task.init(nodes), self.rows(nodes))

    def mass(self, nodes: Tensor, states: Iterable[Any]) -> Mass | None:
        """Return the weight of some nodes, given their states; None: there is no such thing.

        It takes their models at the outset, and is only of interest where there is churn.
        """
        if self.mixing.conserves != "mass" or self.churn is None:
            return None
        send = self.algorithm.send
        held = sum(float(send(state).w.sum()) for state in states)
        return Mass(float(send(self.fresh(nodes)).w.sum()), held)

    def joined(self, node: int, offers: Sequence[Offer], own: Position | None) -> Position | None:
        """Return where a node goes on that comes late, or comes back; see `joining.position`."""
        algorithm, rows = self.algorithm, self.rows(torch.tensor([node]))
        return position(offers, own, algorithm.model, lambda params: algorithm.init(params, rows))

    def peer(self, node: int, begin: Position | None = None) -> Machine:
        """Return the state machine of one node, which may go on from somewhere."""
        nodes = torch.tensor([node])
        params, steps = self.task.init(nodes), int(self.steps(nodes)[0])
        pace, views, rows = self.pace, self._views(node), self.rows(nodes)
        rounds = pace.ticks if isinstance(pace, Tempo) else pace.rounds
        if begin and begin.round >= rounds:  # it has come when the others were about to go
            begin = begin._replace(round=rounds - 1)
        if not len(self.judged(nodes)):
            pace = pace._replace(evaluate_every=0)
        if isinstance(pace, Tempo):
            tempo = pace._replace(steps=steps)
            return Gossiper(self.algorithm, views, tempo, params, rows, begin)
        pace = pace._replace(steps=steps, backlog=self._backlog)
        return Peer(self.algorithm, self.mixing, views, pace, params, rows, begin)

    @cached_property
    def _backlog(self) -> int:
        """How many messages of one sender a peer keeps.

        In step, a sender gets as far ahead as its receiver is away from it: one round where
        links go both ways, up to n - 1 on a directed ring.
        """
        topology = self.topology
        if topology.period == 1 and topology.is_symmetric:
            return BACKLOG
        try:
            return max(BACKLOG, topology.reach() + 1)
        except ValueError:  # nothing comes back to some sender, so nothing holds it back
            return BACKLOG

    @cached_property
    def _neighbours(self) -> Tensor:
        """The neighbours of all nodes in a graph that stays, ``[n, k]``, padded with -1."""
        heard = [self.topology.view(node, 0)[1] for node in range(self.topology.n)]
        most = max(1, *map(len, heard))
        return torch.tensor([[*each, *[-1] * (most - len(each))] for each in heard])

    def _views(self, node: int) -> Views:
        """Say whom a node talks to, given a round and who is gone."""
        if self.among is None:
            return Views(lambda round, gone: self._view(self.topology, node, round))
        always = self.topology.period == 1
        whole = lru_cache(maxsize=1)(lambda: self._view(self._without(frozenset()), node, 0))

        def of(round: int, gone: frozenset[int]) -> View:
            if always and not gone:
                return whole()
            return self._view(self._without(gone - {node}), node, round)

        return Views(of, follow=True, mutual=self.topology.is_symmetric)

    def _view(self, topology: Topology, node: int, round: int) -> View:
        sends_to, hears_from = topology.view(node, round)
        weights = self._weighted(topology).view_weights(node, round)
        if weights is None:
            return View(sends_to, hears_from)
        given, taken = weights
        return View(
            sends_to,
            hears_from,
            dict(zip(sends_to, given, strict=True)),
            dict(zip(hears_from, taken, strict=True)),
        )

    @cached_property
    def _without(self) -> Callable[[frozenset[int]], Topology]:
        """The topology without those who are gone: all peers of a process look it up by them.

        To name all who are there, for every peer in every round, would take n^2 of time.
        """
        among, nodes = self.among, range(self.topology.n)
        assert among is not None
        return lru_cache(maxsize=BACKLOG)(
            lambda gone: among(tuple(other for other in nodes if other not in gone))
        )

    @cached_property
    def _weighted(self) -> Callable[[Topology], Topology]:
        """A topology with the weights of its links, worked out once for all peers of a process."""
        return lru_cache(maxsize=BACKLOG)(lambda topology: weighted(topology, self.mixing))


Status = Literal["running", "finished", "interrupted", "failed"]
