"""Local training: the one loop that every runtime calls."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, M, R, S
from p2pfl.data.batches import BatchSize
from p2pfl.learning.checks import require
from p2pfl.learning.task import Task
from p2pfl.learning.tree import concat, leaves, take


def train(
    algorithm: Algorithm[S, M, R],
    task: Task,
    state: S,
    nodes: Tensor,
    first: Tensor,
    count: Tensor,
) -> tuple[S, Tensor]:
    """Make ``count[i]`` local steps on row i, the first of which is its step ``first[i]``.

    Rows need not make equally many: the block shrinks as they finish, and is joined again
    at the end, so that no row depends on who else is in the block.

    Args:
        algorithm: where gradients are taken and what is made of them.
        task: what gives the gradients.
        state: of the rows.
        nodes: the node behind each row, int64 ``[rows]``.
        first: int64 ``[rows]``.
        count: int64 ``[rows]``, each >= 0.

    Returns:
        the new state, and the mean loss over each row's steps, ``[rows]``, measured before
        each step; NaN for a row that makes none.
    """
    some = next(leaf for leaf in leaves(state) if leaf.is_floating_point())
    device, dtype = some.device, torch.promote_types(some.dtype, torch.float32)
    nodes, first, count = nodes.to(device), first.to(device), count.to(device)
    stages = sorted(set(count.tolist()))
    total = torch.zeros(len(nodes), dtype=dtype, device=device)
    if len(stages) <= 1:
        steps = max(stages, default=0)
        state, total = _run(algorithm, task, state, nodes, first, steps, total)
        return state, total / count
    at, done = torch.arange(len(nodes), device=device), 0
    finished = []
    for until in stages:
        steps = until - done
        state, total = _run(algorithm, task, state, nodes[at], first[at] + done, steps, total)
        over = count[at] == until
        finished.append(take((state, total / until, at), _where(over)))
        state, total, at = take((state, total, at), _where(~over))
        done = until
    state, loss, at = concat(finished)
    state, loss = take((state, loss), at.argsort())
    return state, loss


def local_steps(examples: Tensor, batch_size: BatchSize, epochs: int) -> Tensor:
    """Return the steps which make up so many passes over each node's data, int64 ``[rows]``.

    The last batch of a pass counts as a step even where it is smaller.

    >>> local_steps(torch.tensor([64, 65, 3, 0]), 32, 2).tolist()
    [4, 6, 2, 0]
    """
    require(epochs >= 0, "epochs", epochs, "a whole number >= 0")
    if batch_size == "full":
        return examples.clamp(max=1) * epochs
    require(batch_size >= 1, "batch_size", batch_size, 'a whole number >= 1 or "full"')
    return (examples + batch_size - 1) // batch_size * epochs


def _run(  # noqa: PLR0913 - `train`'s own arguments, and the sum so far
    algorithm: Algorithm[S, M, R],
    task: Task,
    state: S,
    nodes: Tensor,
    first: Tensor,
    steps: int,
    total: Tensor,
) -> tuple[S, Tensor]:
    """Make equally many steps on every row; return the state and the sum of the losses."""
    for step in range(steps):
        loss, grads = task.grad(algorithm.model(state), nodes, first + step)
        state = algorithm.step(state, grads)
        total = total + loss
    return state, total


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)
