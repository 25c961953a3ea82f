"""What is learned: losses and gradients for a block of rows."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from p2pfl import rng
from p2pfl.data.batches import BatchSize, EpochOrders, batch_indices, batch_sizes
from p2pfl.data.shards import Examples, Shards
from p2pfl.data.statistics import Affine
from p2pfl.learning.backends import Auto, BackendFactory, Batch, seeded
from p2pfl.learning.cache import cache_bytes
from p2pfl.learning.evaluation import Evaluator, Scores
from p2pfl.learning.losses import Loss
from p2pfl.learning.modules import assemble, estimate_buffers, pure
from p2pfl.learning.scratch import Scratch
from p2pfl.learning.spec import Spec
from p2pfl.learning.tree import wide

AffineOf = Callable[[Tensor], Affine]  # node ids [rows] -> constants [rows, f]

_PLANNED = 256 << 20  # bytes, up to which the places of batches are drawn ahead
EVALUATED = 16  # rows evaluated together
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

    @property
    def block(self) -> int:
        """How many rows are best trained together; by default all."""
        return sys.maxsize

    @property
    def parallel(self) -> bool:
        """Whether several threads may train different rows; by default not."""
        return False

    def prepare(self, nodes: Tensor, first: Tensor, count: int) -> None:
        """Be told that so many steps of all these rows come next, block by block."""
        return

    def descend(self, params: Tensor, nodes: Tensor, first: Tensor, factors: Tensor) -> Tensor:
        """Make plain gradient steps in place; return the sum of each row's losses, ``[rows]``.

        Step ``first[i] + k`` adds ``factors[k, i]`` times the gradient to row i; `factors` is
        ``[steps, rows, 1]``. By default it is done with `grad`.
        """
        total = torch.zeros(len(params), dtype=wide(params), device=params.device)
        for step, factor in enumerate(factors):
            loss, grads = self.grad(params, nodes, first + step)
            params.add_(grads * factor.to(grads.dtype))
            total += loss
        return total


class ModelTask(Task):
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
        dtype: of the parameters.
        compute: of examples, activations and gradients; None: as `dtype`.
        block: how many rows are trained together; None: as many as fit the cache.
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
        backend: BackendFactory = Auto,
        dtype: torch.dtype = torch.float32,
        compute: torch.dtype | None = None,
        block: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dtype, self.compute, self.device = dtype, compute or dtype, torch.device(device)
        self.train, self.test = _lowered(train, affine, self.compute).to(self.device), test
        self.batch_size, self.seed, self.affine = batch_size, seed, affine
        model = copy.deepcopy(model).to(self.device, dtype)
        self.spec, self._start = Spec.of(model), Spec.of(model).flatten(model)
        self.model = pure(copy.deepcopy(model).to(self.compute))
        self.backend = backend(self.model, loss, None if self.compute == dtype else self.compute)
        # Half precision is for training: what comes of it is judged in full.
        self._wide = wide(self._start)
        self._judged = self.model if self.compute == self._wide else pure(model.to(self._wide))
        self._evaluator = Evaluator(self._judged, loss)
        self._orders, self._scratch = EpochOrders(self.train, seed), Scratch()
        self._plan: _Plan | None = None
        self._block, self._bytes = block, self._row_bytes()
        least = int(self.train.count.min()) if len(self.train.count) else 0
        # Whether all batches have one size, which then need not be looked at again.
        self._even = batch_size != "full" and least >= batch_size

    @property
    def d(self) -> int:
        """The number of parameters of a row."""
        return self.spec.size

    @property
    def block(self) -> int:
        """How many rows are trained together: as the user says, or as many as fit the cache.

        Threads which take blocks of their own share it; else all work on one.
        """
        if self._block:
            return self._block
        return max(1, cache_bytes(self.device, None if self.parallel else 1) // self._bytes)

    @property
    def parallel(self) -> bool:
        """Whether several threads may train different rows."""
        return self.device.type == "cpu" and self.backend.parallel

    def prepare(self, nodes: Tensor, first: Tensor, count: int) -> None:
        """Draw the batches of all rows at once, which is cheaper than block by block."""
        nodes, first = nodes.to(self.device), first.to(self.device)
        held = self.batch_size if self._even else 0
        if held and count and len(nodes) * count * int(held) * nodes.itemsize < _PLANNED:
            rows = torch.full((self.train.count.numel(),), -1, device=self.device)
            rows[self.train.find(nodes)] = torch.arange(len(nodes), device=self.device)
            self._plan = _Plan(rows, first, count, self._drawn(nodes, first, count))

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
        groups = [*self._alike(nodes)]
        if groups and groups[0] is None:
            return self.backend(params, *next(self._batches(nodes, steps, 1)))
        losses = params.new_full((len(params),), math.nan, dtype=self._wide)
        grads = torch.zeros_like(params)
        for rows in groups:
            batch = next(self._batches(nodes[rows], steps[rows], 1))
            losses[rows], grads[rows] = self.backend(params[rows], *batch)
        return losses, grads

    def descend(self, params: Tensor, nodes: Tensor, first: Tensor, factors: Tensor) -> Tensor:
        """Make plain gradient steps in place; return the sum of each row's losses, ``[rows]``.

        Step ``first[i] + k`` adds ``factors[k, i]`` times the gradient to row i; `factors` is
        ``[steps, rows, 1]``. A node without examples has loss NaN and stays where it is.
        """
        nodes, first = nodes.to(self.device), first.to(self.device)
        total = params.new_full((len(params),), math.nan, dtype=self._wide)
        for rows in self._alike(nodes):
            if rows is None:
                return self._descend(params, nodes, first, factors)
            part = params[rows]
            total[rows] = self._descend(part, nodes[rows], first[rows], factors[:, rows])
            params[rows] = part
        return total

    def batch(self, nodes: Tensor, steps: Tensor) -> Examples:
        """Return the batch of every row's step, standardised, ``[rows, b, ...]``.

        The nodes must have batches of one size.
        """
        x, y, _ = next(self._batches(nodes, steps, 1))
        return Examples(x.clone(), y)

    def standardised(self, x: Tensor, nodes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return raw examples ``[rows, b, ...]`` as the model of each row sees them.

        Args:
            x: the examples.
            nodes: whose they are, ``[rows]``.
            dtype: what they are wanted in; None: what gradients are computed in.
        """
        dtype = dtype or self.compute
        x = x.to(self.device)
        if not x.is_floating_point():
            return x
        if self.affine is None:
            return x.to(dtype)
        x = x.to(self._wide)  # raw numbers are not for half precision
        shift, scale = (field.to(x).unsqueeze(1) for field in self.affine(nodes))
        flat = Affine(shift, scale).apply(x.flatten(2))
        return flat.reshape(len(nodes), *x.shape[1:]).to(dtype)

    def evaluate(self, params: Tensor, nodes: Tensor) -> Scores:
        """Return the scores of every row on the test examples.

        Where every node has test examples of its own, each row is scored on those.
        """
        if self.test is None or not len(params):
            return Scores(*params.new_full((2, len(params)), math.nan))
        if isinstance(self.test, Examples):
            test = self.test
            cuts = [slice(i, i + EVALUATED) for i in range(0, len(params), EVALUATED)]
            parts = [self._score(params[cut], nodes[cut], test) for cut in cuts]
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
        views = self.spec.unflatten(params.reshape(self.d).to(self._wide))
        return assemble(self._judged, views, self._buffers(views, node))

    def _alike(self, nodes: Tensor) -> Iterator[Tensor | None]:
        """Yield the rows whose batches have one size; None where that is all of them."""
        if self._even and len(nodes):
            yield None
            return
        sizes = batch_sizes(self.train, nodes, self.batch_size)
        if len(sizes) and int(sizes[0]) > 0 and bool((sizes == sizes[0]).all()):
            yield None
            return
        for size in sorted(set(sizes.tolist()) - {0}):
            yield (sizes == size).nonzero().squeeze(1)

    def _batches(self, nodes: Tensor, first: Tensor, count: int) -> Iterator[Batch]:
        """Yield the examples, targets and keys of `count` steps, for rows of one batch size.

        The examples of a step are overwritten by those of the next.
        """
        index = self._plan.of(self.train.find(nodes), first, count) if self._plan else None
        if index is None:
            index = self._drawn(nodes, first, count)
        keys = torch.zeros(len(nodes), count, dtype=torch.int64, device=first.device)
        if self.backend.draws:
            steps = first.unsqueeze(1) + torch.arange(count, device=first.device)
            keys = rng.fold(rng.keys(self.seed, nodes).unsqueeze(1), steps)
        held = self.train.x
        shape = (index.numel() // count, *held.shape[1:])
        memory = self._scratch.of("examples", shape, held, held.dtype)
        for k, part in enumerate(index.chunk(count, 1)):
            x, y = self.train.gather(part, memory)
            yield self.standardised(x, nodes), y, keys[:, k]

    def _drawn(self, nodes: Tensor, first: Tensor, count: int) -> Tensor:
        """Return where the examples of so many steps lie, ``[rows, count * b]``."""
        given = (self.train, nodes, first, self.batch_size, self.seed, self._orders)
        return batch_indices(*given, count)

    def _descend(self, params: Tensor, nodes: Tensor, first: Tensor, factors: Tensor) -> Tensor:
        return self.backend.descend(params, self._batches(nodes, first, len(factors)), factors)

    def _row_bytes(self) -> int:
        """Return the bytes of a row and its batch."""
        examples = self.train.x[:1]
        most = int(self.train.count.max()) if len(self.train.count) else 0
        size = most if self.batch_size == "full" else min(self.batch_size, most)
        return self.d * self.dtype.itemsize + size * examples.numel() * self.compute.itemsize

    def _score(self, params: Tensor, nodes: Tensor, examples: Examples) -> Scores:
        params = params.to(self._wide)
        views = self.spec.unflatten(params)
        rows = [{name: view[i] for name, view in views.items()} for i in range(len(params))]
        each = [self._buffers(row, node) for row, node in zip(rows, nodes.tolist(), strict=True)]
        buffers = {name: torch.stack([own[name] for own in each]) for name in each[0]}
        x = examples.x.unsqueeze(0)
        if self.affine is not None:
            x = x.expand(len(nodes), *examples.x.shape)
        y = examples.y.to(self.device)
        return self._evaluator(params, buffers, self.standardised(x, nodes, self._wide), y)

    def _buffers(self, params: dict[str, Tensor], node: int) -> dict[str, Tensor]:
        if not self.model.statistics:
            return {}
        x = self.train.rows_of(node).x
        if len(x) > _ENOUGH:  # evenly spaced, since a shard may be sorted
            x = x[torch.arange(_ENOUGH, device=x.device) * len(x) // _ENOUGH]
        who = torch.tensor([node], device=self.device)
        own = self.standardised(x.unsqueeze(0), who, self._wide)[0]
        with seeded(own, 0):  # a model may draw here, too
            return estimate_buffers(self._judged, params, own)


class _Plan(NamedTuple):
    """Batches that were drawn for many rows at once."""

    rows: Tensor  # [nodes held]: which row of the others is theirs, -1: none
    first: Tensor  # [rows]
    steps: int
    drawn: Tensor  # [rows, steps * b]

    def of(self, at: Tensor, first: Tensor, count: int) -> Tensor | None:
        """Return what was drawn for some nodes and steps, or None if it was something else."""
        if count != self.steps:
            return None
        rows = self.rows[at]
        same = (rows >= 0) & (self.first[rows] == first)
        return self.drawn.index_select(0, rows) if bool(same.all()) else None


def _lowered(train: Shards, affine: AffineOf | None, dtype: torch.dtype) -> Shards:
    """Return examples that are computed with in half precision and not standardised so."""
    if affine is None and train.x.is_floating_point() and dtype.itemsize < train.x.itemsize:
        return replace(train, x=train.x.to(dtype))
    return train


def per_node(affine: Affine, nodes: Tensor | None = None) -> AffineOf:
    """Return the constants of nodes, from those of some nodes, ``[held, f]``.

    `nodes`, int64 ``[held]``, tells whose they are; by default row i is node i.
    """
    if nodes is None:
        return lambda asked: Affine(*(field[asked.to(field.device)] for field in affine))
    order = nodes.argsort()
    held = nodes[order]

    def rows_of(asked: Tensor) -> Affine:
        asked = asked.to(held.device)
        place = torch.searchsorted(held, asked).clamp(max=len(held) - 1)
        if not torch.equal(held[place], asked):
            raise KeyError(f"no constants for some of the nodes {asked.tolist()}")
        return Affine(*(field[order[place]] for field in affine))

    return rows_of
