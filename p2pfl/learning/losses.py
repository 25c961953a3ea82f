"""Losses: what is minimised, and what counts as correct.

Every function here takes the outputs of a model on some examples, ``[b, k]``, and their
targets, ``[b]``, and returns one number per example, ``[b]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from p2pfl.learning.checks import require

PerExample = Callable[[Tensor, Tensor], Tensor]
Derivative = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Loss(NamedTuple):
    """A loss.

    Attributes:
        name: its name in `LOSSES`.
        outputs: how many outputs the model needs, given the number of classes (0 when the
            targets are numbers).
        each: the loss of every example; a batch has their mean.
        correct: 1 for every example that is classified correctly, else 0; None when being
            correct has no meaning.
        derivative: the loss of every example and its derivative by the outputs, for
            ``[rows, b, k]`` and ``[rows, b]``, in memory of its own; None leaves it to
            autograd.
    """

    name: str
    outputs: Callable[[int], int]
    each: PerExample
    correct: PerExample | None = None
    derivative: Derivative | None = None


def cross_entropy() -> Loss:
    """Softmax cross-entropy in nats; targets are class numbers, int64."""

    def each(outputs: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, y.long(), reduction="none")

    def correct(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.argmax(-1) == y).to(outputs.dtype)

    def outputs(classes: int) -> int:
        require(classes >= 2, "classes", classes, "at least 2 for cross_entropy")
        return classes

    def derivative(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        target = y.long().unsqueeze(-1)
        logs = outputs.log_softmax(-1)
        loss = -logs.gather(-1, target).squeeze(-1)
        return loss, logs.exp_().scatter_add_(-1, target, torch.full_like(logs[..., :1], -1.0))

    return Loss("cross_entropy", outputs, each, correct, derivative)


def binary() -> Loss:
    """Cross-entropy in nats of one logit; targets are 0 and 1."""

    def each(outputs: Tensor, y: Tensor) -> Tensor:
        logit = outputs.squeeze(-1)
        return functional.binary_cross_entropy_with_logits(
            logit, y.to(logit.dtype), reduction="none"
        )

    def correct(outputs: Tensor, y: Tensor) -> Tensor:
        return ((outputs.squeeze(-1) > 0) == (y > 0.5)).to(outputs.dtype)

    def outputs(classes: int) -> int:
        require(classes == 2, "classes", classes, "2 for binary")
        return 1

    def derivative(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        target = y.to(outputs.dtype)
        loss = functional.binary_cross_entropy_with_logits(
            outputs.squeeze(-1), target, reduction="none"
        )
        return loss, outputs.sigmoid() - target.unsqueeze(-1)

    return Loss("binary", outputs, each, correct, derivative)


def squared() -> Loss:
    """Squared error, for regression; targets are ``[b]``, or ``[b, k]`` (their mean)."""

    def each(outputs: Tensor, y: Tensor) -> Tensor:
        target = y.to(outputs.dtype).reshape(outputs.shape)
        return (outputs - target).square().flatten(1).mean(1)

    def derivative(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        miss = outputs - y.to(outputs.dtype).reshape(outputs.shape)
        return miss.square().flatten(2).mean(2), miss * (2 / miss[0, 0].numel())

    return Loss("squared", lambda classes: 1, each, derivative=derivative)


def default_loss(classes: int) -> Loss:
    """Return the loss for so many classes; none is regression.

    >>> [default_loss(classes).name for classes in (0, 2, 10)]
    ['squared', 'cross_entropy', 'cross_entropy']
    """
    require(classes == 0 or classes >= 2, "classes", classes, "0 (regression) or at least 2")
    return cross_entropy() if classes else squared()


LOSSES: Mapping[str, Callable[[], Loss]] = MappingProxyType(
    {"cross_entropy": cross_entropy, "binary": binary, "squared": squared}
)
