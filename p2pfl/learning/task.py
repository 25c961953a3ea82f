"""What is learned: losses and gradients for a block of rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from p2pfl import rng
from p2pfl.data.batches import BatchSize, EpochOrders, batch_indices, batch_sizes
from p2pfl.data.shards import Examples, Shards
from p2pfl.data.statistics import Affine
from p2pfl.learning.backends import LEAST_ROWS, BackendFactory, auto, blocks
from p2pfl.learning.evaluation import Evaluator, Scores
from p2pfl.learning.losses import Loss
from p2pfl.learning.modules import assemble, estimate_buffers, pure
from p2pfl.learning.spec import Spec

AffineOf = Callable[[Tensor], Affine]  # node ids [rows] -> constants [rows, f]

_BATCH_BYTES = 64 << 20  # training examples gathered at a time, over all rows
_ENOUGH = 1024  # examples which batch statistics are estimated from: more change little


class Task(Protocol):
    """Everything a runtime asks of a learning problem.

    `nodes`, int64 ``[rows]``, names the node behind each row, so that a row sees the same
    batch at the same step in whichever runtime it is trained.
    """

    @property
    def d(self) -> int:
        """The number of parameters of a row."""

    def init(self, nodes: Tensor) -> Tensor:
        """Return initial parameters, ``[rows, d]``, in memory of their own."""

    def examples(self, nodes: Tensor) -> Tensor:
        """Return how many training examples each node holds, int64 ``[rows]``."""

    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss ``[rows]`` and the gradient ``[rows, d]`` of every row's step.

        `steps`, int64 ``[rows]``, counts the local steps of each node from 0.
        """

    def evaluate(self, params: Tensor, nodes: Tensor) -> Scores:
        """Return how good every row is on examples that are not trained on."""


class ModelTask:
    """Train an `nn.Module` on shards of data, one shard to a node.

    All nodes start from the weights the module has. At a step, a node takes the batch and
    draws the masks that belong to (seed, node, step), so it makes the same step in every
    runtime. Data are standardised on the fly by constants of each node, outside the model.

    Args:
        model: the module, already built; it is copied.
        loss: what is minimised.
        train: the training examples of the nodes.
        test: examples for `evaluate`: the same for all nodes, or each node's own; None for
            none, when all scores are NaN.
        batch_size: examples per step, fewer where a node holds fewer; ``"full"`` is all.
        seed: of the batches and of the model's random numbers.
        affine: the constants of given nodes (see `per_node`); None leaves the data alone.
        backend: how gradients are computed, one of `backends.BACKENDS`.
        dtype: of parameters and examples.
        device: where the computation is done.
    """

    def __init__(  # noqa: PLR0913 - the meeting point of model, data and machine
        self,
        model: nn.Module,
        loss: Loss,
        train: Shards,
        test: Examples | Shards | None = None,
        *,
        batch_size: BatchSize = 32,
        seed: int = 0,
        affine: AffineOf | None = None,
        backend: BackendFactory = auto,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.train, self.test = train.to(self.device), test
        self.batch_size, self.seed, self.affine = batch_size, seed, affine
        model = copy.deepcopy(model).to(self.device, dtype)
        self.model = pure(model)
        self.backend = backend(self.model, loss)
        self._evaluator = Evaluator(self.model, loss)
        self._start = self.spec.flatten(model)
        self._orders = EpochOrders(self.train, seed)

    @property
    def spec(self) -> Spec:
        """How the parameters lie in a row; its digest tells whether peers fit."""
        return self.model.spec

    @property
    def d(self) -> int:
        """The number of parameters of a row."""
        return self.spec.size

    def init(self, nodes: Tensor) -> Tensor:
        """Start everybody at the weights of the model, ``[rows, d]``."""
        return self._start.repeat(len(nodes), 1)

    def examples(self, nodes: Tensor) -> Tensor:
        """Return how many training examples each node holds, int64 ``[rows]``."""
        return self.train.counts(nodes.to(self.device))

    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss ``[rows]`` and gradient ``[rows, d]`` of every row's batch.

        A node without examples has loss NaN and gradient 0.
        """
        nodes, steps = nodes.to(self.device), steps.to(self.device)
        sizes = batch_sizes(self.train, nodes, self.batch_size)
        groups = sorted(set(sizes.tolist()))
        if len(groups) == 1 and groups[0] > 0:
            return self._grad(params, nodes, steps, groups[0])
        losses, grads = params.new_full((len(params),), math.nan), torch.zeros_like(params)
        for size in groups:
            rows = (sizes == size).nonzero().squeeze(1)
            if size > 0:
                part = self._grad(params[rows], nodes[rows], steps[rows], size)
                losses[rows], grads[rows] = part
        return losses, grads

    def batch(self, nodes: Tensor, steps: Tensor) -> Examples:
        """Return the batch of every row's step, standardised, ``[rows, b, ...]``.

        The nodes must have batches of one size.
        """
        index = batch_indices(self.train, nodes, steps, self.batch_size, self.seed, self._orders)
        x, y = self.train.gather(index)
        return Examples(self.standardised(x, nodes), y)

    def standardised(self, x: Tensor, nodes: Tensor) -> Tensor:
        """Return raw examples ``[rows, b, ...]`` as the model of each row sees them."""
        x = x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)
        if self.affine is None:
            return x
        shift, scale = (field.to(x).unsqueeze(1) for field in self.affine(nodes))
        return Affine(shift, scale).apply(x.flatten(2)).reshape(len(nodes), *x.shape[1:])

    def evaluate(self, params: Tensor, nodes: Tensor) -> Scores:
        """Return the scores of every row on the test examples.

        Where every node has test examples of its own, each row is scored on those.
        """
        if self.test is None or not len(params):
            return Scores(*params.new_full((2, len(params)), math.nan))
        if isinstance(self.test, Examples):
            test = self.test
            parts = [self._score(params[cut], nodes[cut], test) for cut in blocks(params)]
        else:
            parts = [
                self._score(params[i : i + 1], nodes[i : i + 1], self.test.rows_of(node))
                for i, node in enumerate(nodes.tolist())
            ]
        return Scores(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def predictor(self, params: Tensor, node: int) -> nn.Module:
        """Return a plain module in evaluation mode with a row's weights, ``[d]``.

        It stands alone: its batch statistics are those of the node's data, and it expects
        standardised examples.
        """
        views = self.spec.unflatten(params.reshape(self.d))
        return assemble(self.model, views, self._buffers(views, node))

    def _grad(
        self, params: Tensor, nodes: Tensor, steps: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """Compute rows with batches of one size, so many at a time that these fit memory."""
        row_bytes = size * self.train.x[:1].numel() * self.train.x.element_size()
        many = max(LEAST_ROWS, _BATCH_BYTES // max(row_bytes, 1))
        if len(params) <= many:
            return self._backend(params, nodes, steps)
        losses, grads = params.new_empty(len(params)), torch.empty_like(params)
        for start in range(0, len(params), many):
            rows = slice(start, start + many)
            losses[rows], grads[rows] = self._backend(params[rows], nodes[rows], steps[rows])
        return losses, grads

    def _backend(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.batch(nodes, steps)
        keys = rng.fold(rng.keys(self.seed, nodes), steps)
        return self.backend(params, x, y, keys)

    def _score(self, params: Tensor, nodes: Tensor, examples: Examples) -> Scores:
        views = self.spec.unflatten(params)
        rows = [{name: view[i] for name, view in views.items()} for i in range(len(params))]
        each = [self._buffers(row, node) for row, node in zip(rows, nodes.tolist(), strict=True)]
        buffers = {name: torch.stack([own[name] for own in each]) for name in each[0]}
        x = examples.x.unsqueeze(0)
        if self.affine is not None:
            x = x.expand(len(nodes), *examples.x.shape)
        y = examples.y.to(self.device)
        return self._evaluator(params, buffers, self.standardised(x, nodes), y)

    def _buffers(self, params: dict[str, Tensor], node: int) -> dict[str, Tensor]:
        if not self.model.statistics:
            return {}
        x = self.train.rows_of(node).x
        if len(x) > _ENOUGH:  # evenly spaced, since a shard may be sorted
            x = x[torch.arange(_ENOUGH, device=x.device) * len(x) // _ENOUGH]
        own = self.standardised(x.unsqueeze(0), torch.tensor([node], device=self.device))[0]
        return estimate_buffers(self.model, params, own)


def per_node(affine: Affine, nodes: Tensor | None = None) -> AffineOf:
    """Return the constants of nodes, from those of some nodes, ``[held, f]``.

    `nodes`, int64 ``[held]``, tells whose they are; by default row i is node i.
    """
    if nodes is None:
        return lambda asked: Affine(*(field[asked] for field in affine))
    order = nodes.argsort()
    held = nodes[order]

    def rows_of(asked: Tensor) -> Affine:
        place = torch.searchsorted(held, asked).clamp(max=len(held) - 1)
        if not torch.equal(held[place], asked):
            raise KeyError(f"no constants for some of the nodes {asked.tolist()}")
        return Affine(*(field[order[place]] for field in affine))

    return rows_of
