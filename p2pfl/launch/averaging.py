"""Statistics of the features, averaged over the network before training: no row leaves its peer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from p2pfl.algorithms import average
from p2pfl.errors import LocalProtocolError, RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.learning.evaluation import Scores
from p2pfl.learning.task import Task
from p2pfl.peer.plan import Pace
from p2pfl.runtime.links import Links
from p2pfl.runtime.serve import Part, Server
from p2pfl.runtime.setup import Setup
from p2pfl.topology.mixing import metropolis, push
from p2pfl.topology.spectral import rounds_to

AGREED = 1e-13  # how far statistics may still differ between peers, as a part of their spread
# That is rounding where nodes differ by the mean itself; a third more rounds bring its last digits,
# so that all take the second moments around the same point.
MORE = 4 / 3
MOST_ROUNDS = 10_000
LEAST_PATIENCE = 1.0  # seconds to wait for statistics, however short the wait for the others


class Interrupted(Exception):
    """The peer was asked to end before training."""


class Averaging:
    """Averages over the network, ``[1, k, f] -> [1, k, f]``, up to a common factor.

    Each call is a phase of its own. A neighbour lost or too late is an error: peers would
    standardise by different constants, and nobody would notice.

    Args:
        experiment: whose topology it is.
        links: to the neighbours, who have been met.
        node: who we are.
        patience: seconds to wait for a neighbour.
        go_on: asked a few times a second.

    Raises:
        UserError: it would take too long, or cannot be done on this topology.
    """

    def __init__(
        self,
        experiment: Experiment,
        links: Links,
        node: int,
        patience: float,
        go_on: Callable[[], bool],
    ) -> None:
        self._links, self._node, self._go_on = links, node, go_on
        self._topology = experiment.topology
        self._mixing = metropolis() if self._topology.is_symmetric else push()
        try:
            rounds = math.ceil(MORE * rounds_to(self._topology, self._mixing, AGREED))
        except ValueError as error:
            raise UserError(f"preprocess.standardise = 'pooled': {error}") from error
        if rounds > MOST_ROUNDS:
            raise UserError(
                f"preprocess.standardise = 'pooled' takes {rounds} rounds on this topology:"
                " take a denser one, or standardise = 'own'"
            )
        patience = max(patience, LEAST_PATIENCE)
        self._pace = Pace(rounds, steps=0, patience=patience, evaluate_every=max(rounds, 1))
        self._phase = 0

    def __call__(self, moments: Tensor) -> Tensor:
        """Average.

        Raises:
            Interrupted: `go_on` has said no.
            RunError: a neighbour was lost, or too late.
        """
        task = _Vectors(moments.flatten(1))
        none = torch.zeros(1, dtype=torch.int64)
        setup = Setup(
            average(),
            task,
            self._topology,
            self._mixing,
            self._pace,
            lambda nodes: none,
            _no_matrix,
        )
        server = Server(setup, self._node, self._links, Part(self._phase, strict=True))
        self._phase += 1
        try:
            ending = server.run(lambda row, mark: None, self._go_on)
        except RunError as error:
            raise type(error)(f"{error} while statistics were averaged") from error
        if ending.reason == "interrupted":
            raise Interrupted
        return ending.params.reshape(moments.shape)


def _no_matrix(round: int) -> Tensor:
    raise LocalProtocolError("a peer works out its own line of the matrix")


class _Vectors(Task):
    """A task without learning: every node starts from a vector of its own."""

    def __init__(self, vector: Tensor) -> None:
        self._vector = vector

    @property
    def d(self) -> int:
        return self._vector.shape[1]

    def init(self, nodes: Tensor) -> Tensor:
        return self._vector.clone()

    def examples(self, nodes: Tensor) -> Tensor:
        return torch.ones_like(nodes)

    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        return params.new_zeros(len(params)), torch.zeros_like(params)

    def evaluate(self, params: Tensor, nodes: Tensor) -> Scores:
        return Scores(*params.new_full((2, len(params)), math.nan))
