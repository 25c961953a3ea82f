"""How far exchanges have moved the mean of all models, which averaging should leave as it is.

As long as both ends of a link mix alike, what one gains the other loses. What one end mixes
alone moves the mean.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.sketch import WIDTH, sketch


class Drift:
    """Adds up what every exchange has changed in models.

    It is worked out from linear sketches, whose norms are near those of the models (9 %).
    """

    def __init__(self) -> None:
        self._total, self._lock = _nothing(), Lock()

    def watch(self, algorithm: Algorithm[Any, Any, Any]) -> Algorithm[Any, Any, Any]:
        """Return the same algorithm, whose exchanges are added up."""

        def receive(state: Any, inbox: Any) -> Any:  # noqa: ANN401 - of any algorithm
            after = algorithm.receive(state, inbox)
            moved = sketch(algorithm.model(after) - algorithm.model(state)).sum(0).double()
            with self._lock:
                self._total += moved.cpu()
            return after

        return algorithm._replace(receive=receive)

    def take(self) -> Tensor:
        """Return the sketch of what was changed since this was last asked, ``[WIDTH]``."""
        with self._lock:
            taken, self._total = self._total, _nothing()
        return taken


def _nothing() -> Tensor:
    return torch.zeros(WIDTH, dtype=torch.float64)


def watched(setup: Setup) -> Drift | None:
    """Return what watches a run in which the mean may drift and should not."""
    keeps = setup.algorithm.keeps_mean and setup.mixing.conserves == "mean"
    return Drift() if setup.churn and keeps else None


def mean_drift(moved: Tensor, models: Tensor) -> float:
    """Return by how much exchanges have moved the mean of models, as a part of its norm.

    Args:
        moved: the sketch of all that they have changed, ``[WIDTH]``.
        models: those at the end, ``[rows, d]``.
    """
    norm = float(sketch(models.mean(0, keepdim=True)).norm())
    return float(moved.norm()) / len(models) / norm if norm else 0.0
