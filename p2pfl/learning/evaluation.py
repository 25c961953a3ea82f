"""How good the models of some rows are on some examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from p2pfl.learning.backends import REFUSALS, close, seeded
from p2pfl.learning.chain import NotAChain, layers_of, outputs_of
from p2pfl.learning.layers import Layer
from p2pfl.learning.losses import Loss
from p2pfl.learning.modules import Pure, predict

_BATCH_BYTES = 4 << 20  # examples evaluated together, times the rows of a block

Views: TypeAlias = dict[str, Tensor]
Way: TypeAlias = Callable[[Views, Views, Tensor, Tensor], Tensor]


class Scores(NamedTuple):
    """How good each row is."""

    loss: Tensor  # [rows]: the mean loss
    acc: Tensor  # [rows]: the share that is correct; NaN where that has no meaning


class Evaluator:
    """Score blocks of rows in evaluation mode, in bounded memory.

    Chains of well-known layers are stacked by hand. Of other models several rows are stacked
    by `torch.func.vmap` if that works, which is tried once; a single row never is.

    A model that draws random numbers even in evaluation finds torch's global generator seeded
    alike for every row, and the generator is left as it was.
    """

    def __init__(self, model: Pure, loss: Loss) -> None:
        self._model, self._loss = model, loss
        self._stacked: bool | None = None
        self._layers: list[Layer] | None
        try:
            self._layers = layers_of(model, evaluating=True)
        except NotAChain:
            self._layers = None

    def __call__(self, params: Tensor, buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Scores:
        """Return the scores of rows ``[rows, d]`` on examples.

        `buffers` are the estimated statistics of each row, ``[rows, ...]``. The examples
        are ``[rows, b, ...]``, each row having its own, or ``[1, b, ...]`` for all; the
        targets, ``[b]``, are the same for all. Without examples the scores are NaN.
        """
        if not len(y):
            return Scores(*params.new_full((2, len(params)), math.nan))
        views = self._model.spec.unflatten(params)
        sums = params.new_zeros(len(params), 2)
        with torch.no_grad():
            way = self._way(views, buffers, x, y)
            # One at a time, a row's examples are cut up as if it were alone.
            together = 1 if way == self._loop else len(params)
            for part in _chunks(x, together):
                sums += way(views, buffers, x[:, part], y[part])
        loss, acc = (sums / len(y)).unbind(1)
        return Scores(loss, acc)

    def _way(self, params: Views, buffers: Views, x: Tensor, y: Tensor) -> Way:
        """Return how to compute the sums of these rows."""
        if self._layers is not None:
            return self._chain
        if len(next(iter(params.values()))) <= 1:
            return self._loop
        if self._stacked is None:
            self._stacked = self._works(params, buffers, x[:2, :8], y[:8])
        return self._stack if self._stacked else self._loop

    def _chain(self, params: Views, buffers: Views, x: Tensor, y: Tensor) -> Tensor:
        assert self._layers is not None
        rows = len(next(iter(params.values())))
        outputs = outputs_of(self._layers, params, x.expand(rows, *x.shape[1:]))
        return self._summed(outputs.flatten(0, 1), y.repeat(rows, *[1] * (y.ndim - 1)), rows)

    def _summed(self, outputs: Tensor, y: Tensor, rows: int) -> Tensor:
        """Return the sum of the losses and the number of correct answers, ``[rows, 2]``."""
        loss = self._loss.each(outputs, y).view(rows, -1).sum(1)
        correct = self._loss.correct
        if correct is None:
            return torch.stack([loss, torch.full_like(loss, math.nan)], 1)
        hits = correct(outputs, y).view(rows, -1).sum(1)
        return torch.stack([loss, hits.to(loss.dtype)], 1)

    def _works(self, params: Views, buffers: Views, x: Tensor, y: Tensor) -> bool:
        two = ({name: value[:2] for name, value in part.items()} for part in (params, buffers))
        params, buffers = two
        try:
            found = self._stack(params, buffers, x, y)
        except REFUSALS:
            return False
        return close(found, self._loop(params, buffers, x, y))

    def _stack(self, params: Views, buffers: Views, x: Tensor, y: Tensor) -> Tensor:
        own = len(x) > 1  # else the examples are shared, and need not be repeated
        stacked = torch.func.vmap(self._row, in_dims=(0, 0, 0 if own else None, None))
        sums: Tensor = stacked(params, buffers, x if own else x[0], y)
        return sums

    def _loop(self, params: Views, buffers: Views, x: Tensor, y: Tensor) -> Tensor:
        sums = []
        for i in range(len(next(iter(params.values())))):
            own, its = ({name: value[i] for name, value in v.items()} for v in (params, buffers))
            with seeded(x, 0):
                sums.append(self._row(own, its, x[i] if len(x) > 1 else x[0], y))
        return torch.stack(sums)

    def _row(self, params: Views, buffers: Views, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the losses and the number of correct answers, ``[2]``."""
        return self._summed(predict(self._model, params, buffers, x), y, 1)[0]


def _chunks(x: Tensor, rows: int) -> list[slice]:
    """Cut examples ``[..., b, ...]`` so that what so many rows make of a chunk is bounded."""
    column = max(rows * x[:1, :1].numel() * x.element_size(), 1)
    size = max(16, _BATCH_BYTES // column)
    return [slice(i, i + size) for i in range(0, x.shape[1], size)]
