"""Local training: the one loop that every runtime calls.

A block of rows is trained to completion while its parameters are in the processor's cache,
then the next: sweeping over all rows step by step would fetch every model from memory for
every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, ByColumn, M, R, S
from p2pfl.data.batches import BatchSize
from p2pfl.learning.checks import require
from p2pfl.learning.crew import share_out
from p2pfl.learning.pieces import BLOCK
from p2pfl.learning.task import Task
from p2pfl.learning.tree import (
    assign,
    columns,
    leaves,
    merged,
    put_,
    take,
    tree_map,
    views,
    wide,
    write_columns,
)

TOGETHER = 64  # plain steps whose batches are drawn at once


def train(
    algorithm: Algorithm[S, M, R],
    task: Task,
    state: S,
    nodes: Tensor,
    first: Tensor,
    count: Tensor,
) -> tuple[S, Tensor]:
    """Return the state after local steps, and their mean loss; see `train_`."""
    state = tree_map(torch.clone, state)
    return state, train_(algorithm, task, state, nodes, first, count)


def train_(
    algorithm: Algorithm[S, M, R],
    task: Task,
    state: S,
    nodes: Tensor,
    first: Tensor,
    count: Tensor,
) -> Tensor:
    """Make ``count[i]`` local steps on row i, the first of which is its step ``first[i]``.

    No row depends on who else is in the block. If it is broken off, rows are between two steps or
    in the midst of one.

    Args:
        algorithm: where gradients are taken and what is made of them.
        task: what gives the gradients.
        state: of the rows; overwritten. Its leaves must not share memory.
        nodes: the node behind each row, int64 ``[rows]``.
        first: int64 ``[rows]``.
        count: int64 ``[rows]``, each >= 0.

    Returns:
        the mean loss over each row's steps, ``[rows]``, measured before each step; NaN for a
        row that makes none.
    """
    total = _zeros(state, len(nodes))
    nodes, first, count = (part.to(total.device) for part in (nodes, first, count))
    even = len(nodes) == 0 or bool((count == count[0]).all())
    # Rows which make equally many steps are neighbours, so that they stay stacked.
    order = None if even else count.argsort(stable=True)

    def visit(rows: slice) -> None:
        if order is None:
            part, at = views(state, rows), rows
            total[at] = _visit(algorithm, task, part, nodes[at], first[at], count[at])
            return
        some = order[rows]
        part = take(state, some)
        total[some] = _visit(algorithm, task, part, nodes[some], first[some], count[some])
        put_(state, some, part)

    alone = len(nodes) <= task.block  # then all threads work on it together
    if even and not alone and algorithm.factor and int(count[0]) <= TOGETHER:
        task.prepare(nodes, first, int(count[0]))
    done = 0
    if not (alone or task.parallel):  # with the first block, a backend finds out whether it is
        visit(slice(0, done := task.block))
    share_out(visit, len(nodes), task.block, task.parallel and not alone, done)
    return total / count


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


def _visit(
    algorithm: Algorithm[S, M, R],
    task: Task,
    state: S,
    nodes: Tensor,
    first: Tensor,
    count: Tensor,
) -> Tensor:
    """Train one block, whose rows are in the order of their counts; return summed losses."""
    total, done = _zeros(state, len(nodes)), 0
    for until in sorted(set(count.tolist())):
        left = slice(len(nodes) - int((count >= until).sum()), None)
        steps, part = until - done, views(state, left)
        total[left] += _steps(algorithm, task, part, nodes[left], first[left] + done, steps)
        done = until
    if algorithm.settle is not None:
        made = views(state, slice(len(nodes) - int((count > 0).sum()), None))
        assign(made, algorithm.settle(made))
    return total


def _steps(
    algorithm: Algorithm[S, M, R],
    task: Task,
    state: S,
    nodes: Tensor,
    first: Tensor,
    steps: int,
) -> Tensor:
    """Make equally many steps on every row; return summed losses."""
    total, after = _zeros(state, len(nodes)), state
    if algorithm.factor is not None:
        for begin in range(0, steps, TOGETHER):
            factors = []
            for _ in range(min(TOGETHER, steps - begin)):
                factor, after = algorithm.factor(after)
                factors.append(factor)
            model, multiples = algorithm.model(state), torch.stack(factors)
            total += task.descend(model, nodes, first + begin, multiples)
    else:
        for step in range(steps):
            loss, grads = task.grad(algorithm.model(after), nodes, first + step)
            after = _stepped(algorithm.step, after, grads)
            total += loss
            del grads  # the next ones may lie there
    assign(state, after)
    return total


def _stepped(step: Callable[[S, Tensor], S], state: S, grads: Tensor) -> S:
    """Return the state after a step, which is the old one overwritten where that can be.

    A model that is larger than the cache is then fetched once, not once for every operation, and
    nothing of its size is made in between.
    """
    d = grads.shape[1]
    if not isinstance(step, ByColumn) or d <= BLOCK or grads.device.type != "cpu":
        return step(state, grads)
    after = state
    for start in range(0, d, BLOCK):
        some = slice(start, start + BLOCK)
        part = columns(state, d, some)
        after = step(part, grads[:, some])
        write_columns(part, after, state, d)
    assign(state, merged(state, after, d))  # what is small is the same in all blocks
    return state


def _zeros(state: S, rows: int) -> Tensor:
    """Return zeros in a type and on the device in which the losses of the rows are summed."""
    some = next(leaf for leaf in leaves(state) if leaf.is_floating_point())
    return torch.zeros(rows, dtype=wide(some), device=some.device)
