"""A task whose solution is known, to test algorithms and runtimes against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.learning.evaluation import Scores
from p2pfl.learning.task import Task


class Quadratics(Task):
    """Node i minimises ``|A_i x - b_i|^2 / 2`` from noisy gradients, in float64.

    Args:
        n: the number of nodes.
        d: the number of parameters.
        noise: the standard deviation of what is added to each coordinate of a gradient.
        seed: of the problem and of the noise.
    """

    def __init__(self, n: int, d: int, noise: float = 0.0, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.a = torch.eye(d).double() + 0.3 * torch.randn(n, d, d, generator=draw) / d**0.5
        self.b = torch.randn(n, d, generator=draw).double()
        self._d, self.noise, self.seed = d, noise, seed

    @property
    def d(self) -> int:
        """The number of parameters of a row."""
        return self._d

    def init(self, nodes: Tensor) -> Tensor:
        """Start everybody at the origin, ``[rows, d]``."""
        return torch.zeros(len(nodes), self.d, dtype=torch.float64)

    def examples(self, nodes: Tensor) -> Tensor:
        """Return d for every node: one equation is one example, ``[rows]``."""
        return torch.full_like(nodes, self.d)

    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses ``[rows]``, without the noise, and noisy gradients ``[rows, d]``."""
        a = self.a[nodes]
        miss = _times(a, params) - self.b[nodes]
        grads = _times(a.mT, miss)
        if self.noise:
            keys = rng.fold(rng.keys(self.seed, nodes), steps)
            grads = grads + self.noise * rng.normal(keys, self.d)
        return miss.square().sum(1) / 2, grads

    def evaluate(self, params: Tensor, nodes: Tensor) -> Scores:
        """Return the mean loss over all the nodes at each row's parameters; no accuracy."""
        miss = torch.einsum("nij,rj->rni", self.a, params) - self.b
        loss = miss.square().sum(2).mean(1) / 2
        return Scores(loss, torch.full_like(loss, math.nan))

    def optimum(self) -> Tensor:
        """Return the minimiser of the mean loss over all nodes, ``[d]``."""
        a = (self.a.mT @ self.a).mean(0)
        best: Tensor = torch.linalg.solve(a, _times(self.a.mT, self.b).mean(0))
        return best


def _times(a: Tensor, x: Tensor) -> Tensor:
    return (a @ x.unsqueeze(-1)).squeeze(-1)
