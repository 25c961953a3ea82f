"""How good models are on what their hearers would train on next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from p2pfl.learning.task import Task

# Models [rows, k, d], whose rows they are and the next local step of each, int64 [rows]
# -> the loss of every model on the batch of that step, [rows, k].
Judge: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def judge(task: Task) -> Judge:
    """Return what judges models by the losses of a task.

    A loss costs as much as a local step, whose gradient is worked out and not used: so a model is
    judged on the very batch, with the very lots, that it would be trained on, in any task.
    """

    def losses(models: Tensor, nodes: Tensor, steps: Tensor) -> Tensor:
        blocks = [slice(i, i + task.block) for i in range(0, len(models), task.block)]
        return torch.cat([_losses(task, models[b], nodes[b], steps[b]) for b in blocks])

    return losses


def unjudged(models: Tensor, nodes: Tensor, steps: Tensor) -> Tensor:
    """Judge nothing: stands in for a judge where there is no task yet, and nothing to receive."""
    raise NotImplementedError("there is no task to judge models by")


def _losses(task: Task, models: Tensor, nodes: Tensor, steps: Tensor) -> Tensor:
    return torch.stack([task.grad(each, nodes, steps)[0] for each in models.unbind(1)], 1)
